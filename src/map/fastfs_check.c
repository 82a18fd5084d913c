// What has to be true of a file and its file system before its blocks may be written to behind its back.
// Each thing that is not gets its own line.

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "map/fastfs.h"
#include "util/util.h"

static const struct {
    unsigned long magic;
    const char *name;
} other_systems[] = {
    {BTRFS_SUPER_MAGIC, "btrfs"}, {OVERLAYFS_SUPER_MAGIC, "overlayfs"},
    {TMPFS_MAGIC, "tmpfs"},       {RAMFS_MAGIC, "ramfs"},
    {NFS_SUPER_MAGIC, "NFS"},     {FUSE_SUPER_MAGIC, "FUSE"},
    {F2FS_SUPER_MAGIC, "F2FS"},   {SMB2_SUPER_MAGIC, "SMB"},
    {CEPH_SUPER_MAGIC, "Ceph"},   {MSDOS_SUPER_MAGIC, "FAT"},
    {EXFAT_SUPER_MAGIC, "exFAT"}, {OCFS2_SUPER_MAGIC, "OCFS2"},
};

static int check_system(int fd, const char *path, struct fastfs_place *place, struct err *err)
{
    const char *name = "its file system";
    struct statfs fs;

    if (fstatfs(fd, &fs) < 0)
        return err_set(err, -errno, "%s: statfs: %s", path, strerror(errno));
    place->block_bytes = (uint32_t)fs.f_bsize;
    if (fs.f_type == EXT4_SUPER_MAGIC || fs.f_type == XFS_SUPER_MAGIC) {
        place->fs = fs.f_type == XFS_SUPER_MAGIC ? "XFS" : "ext4";
        if (is_power_of_2(place->block_bytes) && place->block_bytes >= 512)
            return 0;
        return err_set(err, -EINVAL, "%s: fastfs: blocks of %u bytes; use --map linear", path,
                       place->block_bytes);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(other_systems); i++) {
        if ((unsigned long)fs.f_type == other_systems[i].magic)
            name = other_systems[i].name;
    }
    return err_set(
        err, -EOPNOTSUPP,
        "%s: fastfs: %s does not tell where its blocks are in a way that lasts; use --map linear, or "
        "move the image to ext4 or XFS",
        path, name);
}

// Per file: what is written is not what lies on the device, or does not lie on the device of st_dev.
int fastfs_check_file(int fd, const char *path, struct err *err)
{
    static const struct {
        uint64_t attribute;
        const char *what;
    } attributes[] = {
        {STATX_ATTR_ENCRYPTED, "encrypted by its file system"},
        {STATX_ATTR_VERITY, "protected by fs-verity"},
        {STATX_ATTR_COMPRESSED, "compressed"},
        {STATX_ATTR_DAX, "accessed by DAX, without blocks in between"},
    };
    struct fsxattr attr;
    struct statx stx;
    int flags;

    if (statx(fd, "", AT_EMPTY_PATH, 0, &stx) < 0)
        return err_set(err, -errno, "%s: statx: %s", path, strerror(errno));
    for (unsigned i = 0; i < ARRAY_SIZE(attributes); i++) {
        if (stx.stx_attributes & attributes[i].attribute)
            return err_set(err, -EOPNOTSUPP, "%s: fastfs: the file is %s; use --map linear", path,
                           attributes[i].what);
    }
    if (!ioctl(fd, FS_IOC_FSGETXATTR, &attr) && (attr.fsx_xflags & FS_XFLAG_REALTIME))
        return err_set(err, -EOPNOTSUPP,
                       "%s: fastfs: the file lies on XFS's realtime device; use --map linear", path);
    if (!ioctl(fd, FS_IOC_GETFLAGS, &flags) && (flags & FS_JOURNAL_DATA_FL))
        return err_set(err, -EOPNOTSUPP,
                       "%s: fastfs: its data go through the journal; chattr -j it, or use --map linear",
                       path);
    return 0;
}

// The node in /dev of the block device that the file system stands on.
static int check_device(const char *path, const struct stat *st, struct fastfs_place *place, struct err *err)
{
    char link[64], uevent[PATH_MAX], name[200] = "";
    struct stat dev;
    FILE *file;

    snprintf(link, sizeof(link), "/sys/dev/block/%u:%u/uevent", major(st->st_dev), minor(st->st_dev));
    file = fopen(link, "re");
    if (!file)
        return err_set(
            err, -ENODEV,
            "%s: fastfs: no single block device stands behind its file system (%u:%u); use --map linear",
            path, major(st->st_dev), minor(st->st_dev));
    while (fgets(uevent, sizeof(uevent), file)) {
        if (sscanf(uevent, "DEVNAME=%199[^\n]", name) == 1)
            break;
    }
    fclose(file);
    snprintf(place->device, sizeof(place->device), "/dev/%s", name);
    place->rdev = st->st_dev;
    if (!name[0] || stat(place->device, &dev) < 0 || !S_ISBLK(dev.st_mode) || dev.st_rdev != st->st_dev)
        return err_set(err, -ENODEV,
                       "%s: fastfs: %s is not the block device %u:%u; mknod it, or use --map linear", path,
                       place->device, major(st->st_dev), minor(st->st_dev));
    return 0;
}

// ext4 tells all options there, defaults as well (mount(8) leaves out those in the superblock).
static int check_journal(const char *path, const struct fastfs_place *place, struct err *err)
{
    char options[300], line[128];
    bool is_journal = false;
    FILE *file;

    if (strcmp(place->fs, "ext4"))
        return 0;
    snprintf(options, sizeof(options), "/proc/fs/ext4/%s/options", place->device + strlen("/dev/"));
    file = fopen(options, "re");
    if (!file)
        return err_set(err, -errno,
                       "%s: fastfs: %s: %s, so whether data go through the journal cannot be told; use "
                       "--map linear",
                       path, options, strerror(errno));
    while (fgets(line, sizeof(line), file))
        is_journal |= !strcmp(line, "data=journal\n");
    fclose(file);
    if (is_journal)
        return err_set(
            err, -EOPNOTSUPP,
            "%s: fastfs: mounted with data=journal; mount it with data=ordered, or use --map linear", path);
    return 0;
}

int fastfs_check(int fd, const char *path, struct fastfs_place *place, struct err *err)
{
    struct stat st;
    int ret;

    *place = (struct fastfs_place){.fs = ""};
    if (fstat(fd, &st) < 0)
        return err_set(err, -errno, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return err_set(err, -EINVAL,
                       "%s: fastfs: a block device has no file system to get past; use --map linear", path);
    ret = fastfs_check_file(fd, path, err);
    if (!ret)
        ret = check_system(fd, path, place, err);
    if (!ret)
        ret = check_device(path, &st, place, err);
    if (!ret)
        ret = check_journal(path, place, err);
    return ret;
}
