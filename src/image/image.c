// Opening an image: checks first, locks next, nothing is changed in it. Cold.

#include "image/image.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "image/holder.h"
#include "util/util.h"

// QEMU's permissions (include/block/block-common.h), as bits of the bytes that it locks.
enum {
    PERM_CONSISTENT_READ = 1 << 0,
    PERM_WRITE = 1 << 1,
    PERM_RESIZE = 1 << 3,
    PERM_NR_BITS = 4,
};
#define LOCK_PERM_BASE 100
#define LOCK_SHARED_BASE 200
static_assert(LOCK_PERM_BASE + 1 == HOLDER_WRITE_BYTE && 1 << 1 == PERM_WRITE,
              "who is named has to be who writes");
// A server that was killed keeps its locks, and its claim to a block device, until the kernel has taken
// its ring apart: they are waited for a moment.
#define HOLDER_TRIES 10
#define HOLDER_PAUSE_US 30000

static int lock_byte(int fd, int command, short type, off_t at)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};

    if (fcntl(fd, command, &lock) < 0)
        return -errno;
    // F_OFD_GETLK tells who would be in the way.
    return command == F_OFD_GETLK && lock.l_type != F_UNLCK ? -EAGAIN : 0;
}

static int lock_all(int fd, bool is_read_only)
{
    unsigned used = is_read_only ? PERM_CONSISTENT_READ : PERM_CONSISTENT_READ | PERM_WRITE;
    unsigned unshared = PERM_WRITE | PERM_RESIZE;
    int ret;

    // Say what we do and what we do not share, then look whether others mind or do what we do not
    // share. Two that start at once may both be refused, never both let in.
    for (unsigned i = 0; i < PERM_NR_BITS; i++) {
        ret = lock_byte(fd, F_OFD_SETLK, used & 1U << i ? F_RDLCK : F_UNLCK, LOCK_PERM_BASE + i);
        if (ret < 0)
            return ret;
        if ((unshared & 1U << i) && (ret = lock_byte(fd, F_OFD_SETLK, F_RDLCK, LOCK_SHARED_BASE + i)) < 0)
            return ret;
    }
    for (unsigned i = 0; i < PERM_NR_BITS; i++) {
        if ((used & 1U << i) && (ret = lock_byte(fd, F_OFD_GETLK, F_WRLCK, LOCK_SHARED_BASE + i)) < 0)
            return ret;
        if ((unshared & 1U << i) && (ret = lock_byte(fd, F_OFD_GETLK, F_WRLCK, LOCK_PERM_BASE + i)) < 0)
            return ret;
    }
    return 0;
}

void image_unlock(int fd)
{
    // Explicitly: a ring that had fd registered may keep its file open a little longer than we live.
    struct flock lock = {.l_type = F_UNLCK, .l_whence = SEEK_SET};

    fcntl(fd, F_OFD_SETLK, &lock);
}

int image_lock(int fd, bool is_read_only)
{
    int ret;

    for (unsigned i = 0; i < HOLDER_TRIES; i++) {
        ret = lock_all(fd, is_read_only);
        if (ret != -EAGAIN && ret != -EACCES)
            return ret;
        image_unlock(fd);
        usleep(HOLDER_PAUSE_US);
    }
    return -EAGAIN;
}

const char *image_looks_like(const void *head, unsigned len_bytes)
{
    static const struct {
        const char *format;
        unsigned at, len;
        const char *magic;
    } formats[] = {
        {"qcow2", 0, 4, "QFI\xfb"},
        {"qed", 0, 4, "QED\0"},
        {"vmdk", 0, 4, "KDMV"},
        {"vmdk", 0, 4, "COWD"},
        {"vmdk", 0, 21, "# Disk DescriptorFile"},
        {"vhdx", 0, 8, "vhdxfile"},
        {"vpc", 0, 8, "conectix"},
        {"vdi", 64, 4, "\x7f\x10\xda\xbe"},
        {"parallels", 0, 16, "WithoutFreeSpace"},
        {"parallels", 0, 16, "WithouFreSpacExt"},
        {"luks", 0, 6, "LUKS\xba\xbe"},
        {"bochs", 0, 21, "Bochs Virtual HD Image"},
        {"cloop", 0, 26, "#!/bin/sh\n#V2.0 Format\nmod"},
        {"dmg", 0, 4, "koly"},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(formats); i++) {
        if (formats[i].at + formats[i].len <= len_bytes &&
            !memcmp((const char *)head + formats[i].at, formats[i].magic, formats[i].len))
            return formats[i].format;
    }
    return NULL;
}

static int image_check_format(const struct image *image, const struct image_options *options, struct err *err)
{
    const char *format;
    char *head;
    ssize_t n;
    int ret = 0;

    if (options->is_format_raw)
        return 0;
    if (posix_memalign((void **)&head, 4096, 4096))
        return err_set(err, -ENOMEM, "%s: out of memory", image->path);
    n = pread(image->fd, head, 4096, 0);
    format = n > 0 ? image_looks_like(head, (unsigned)n) : NULL;
    if (n < 0)
        ret = err_set(err, -errno, "%s: reading its first block: %s; check the disk below", image->path,
                      strerror(errno));
    else if (format)
        ret = err_set(err, -EINVAL,
                      "%s: looks like a %s image; use --format raw to serve these bytes as they are, "
                      "or convert it first (qemu-img convert -O raw)",
                      image->path, format);
    free(head);
    return ret;
}

static int image_set_flag(int fd, int flag, bool is_on)
{
    int flags = fcntl(fd, F_GETFL);

    return fcntl(fd, F_SETFL, is_on ? flags | flag : flags & ~flag) < 0 ? -errno : 0;
}

static int image_open_fd(struct image *image, const struct image_options *options, struct err *err)
{
    // O_NONBLOCK: opening a FIFO would wait for its other end. Taken off below: io_uring answers
    // -EAGAIN instead of waiting where it is set.
    int flags = (options->is_read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    struct stat st;
    const char *remedy;
    int is_ro;

    if ((options->is_open ? fstat(options->fd, &st) : stat(image->path, &st)) < 0)
        return err_set(err, -errno, "%s: %s; create it first (truncate -s SIZE makes a sparse one)",
                       image->path, strerror(errno));
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return err_set(err, -EINVAL, "%s: is %s; only regular files and block devices can be served",
                       image->path, S_ISDIR(st.st_mode) ? "a directory" : "no file of bytes");
    image->is_block_device = S_ISBLK(st.st_mode);
    if (options->is_open) {
        image->fd = options->fd;
        image->is_direct = options->want_direct && !image_set_flag(image->fd, O_DIRECT, true);
        return 0;
    }
    if (image->is_block_device && !options->is_read_only)
        flags |= O_EXCL; // refused while it is mounted or otherwise claimed
    for (unsigned i = 0; i < HOLDER_TRIES; i++) {
        image->fd = open(image->path, options->want_direct ? flags | O_DIRECT : flags);
        image->is_direct = options->want_direct && image->fd >= 0;
        if (image->fd < 0 && options->want_direct && errno == EINVAL)
            image->fd = open(image->path, flags);
        if (image->fd >= 0 || errno != EBUSY)
            break;
        usleep(HOLDER_PAUSE_US);
    }
    if (image->fd >= 0) {
        image_set_flag(image->fd, O_NONBLOCK, false);
        // Root may open it for writing all the same, and gets EPERM for every write.
        if (image->is_block_device && !options->is_read_only && !ioctl(image->fd, BLKROGET, &is_ro) && is_ro)
            return err_set(err, -EROFS, "%s: the device is read-only; use --read-only", image->path);
        return 0;
    }
    switch (errno) {
    case EACCES:
    case EPERM:
    case EROFS:
        remedy = options->is_read_only ? "; run as a user who may read it" : "; or use --read-only";
        break;
    case EBUSY:
        remedy = "; it is mounted or in use: unmount it, or use --read-only";
        break;
    default:
        remedy = "";
    }
    return err_set(err, -errno, "%s: %s%s", image->path, strerror(errno), remedy);
}

static int image_measure(struct image *image, const struct image_options *options, struct err *err)
{
    off_t end = lseek(image->fd, 0, SEEK_END);

    if (end < 0)
        return err_set(err, -errno, "%s: finding its size: %s", image->path, strerror(errno));
    image->file_bytes = (uint64_t)end;
    if (options->offset_bytes > image->file_bytes)
        return err_set(err, -EINVAL, "%s: --offset %llu lies behind its end (%llu bytes); use a smaller one",
                       image->path, (unsigned long long)options->offset_bytes,
                       (unsigned long long)image->file_bytes);
    image->offset_bytes = options->offset_bytes;
    image->size_bytes = image->file_bytes - options->offset_bytes;
    if (options->size_limit_bytes)
        image->size_bytes = min_of(image->size_bytes, options->size_limit_bytes);
    return 0;
}

// Direct I/O: what offsets, lengths and memory have to be multiples of. STATX_DIOALIGN knows since
// 6.1; a block device can be asked before that; else the largest sector there is.
static void image_align(struct image *image)
{
    struct statx stx;
    int sector_bytes = 0;

    image->sector_bytes = image->dio_offset_align = image->dio_mem_align = 1;
    if (image->is_block_device)
        image->sector_bytes =
            !ioctl(image->fd, BLKSSZGET, &sector_bytes) && is_power_of_2((uint64_t)sector_bytes)
                ? (uint32_t)sector_bytes
                : 4096;
    if (!image->is_direct)
        return;
    image->dio_offset_align = image->dio_mem_align = image->is_block_device ? image->sector_bytes : 4096;
    if (statx(image->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) < 0 || !(stx.stx_mask & STATX_DIOALIGN))
        return;
    if (!stx.stx_dio_offset_align) {
        image->is_direct = false; // this file cannot, though its file system may
    } else if (is_power_of_2(stx.stx_dio_offset_align) && is_power_of_2(stx.stx_dio_mem_align)) {
        image->dio_offset_align = stx.stx_dio_offset_align;
        image->dio_mem_align = stx.stx_dio_mem_align;
    }
}

// tmpfs takes O_DIRECT and does buffered I/O all the same.
static bool image_ignores_direct(const struct image *image)
{
    struct statfs fs;

    return !image->is_block_device && !fstatfs(image->fd, &fs) &&
           (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
}

// What a file with pages in the page cache is punched by. XFS drops whole pages and blocks, writes them
// before and reads them again after; but what has been spliced out of one meanwhile is all zeroes then.
static uint32_t image_punch_bytes(const struct image *image)
{
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE), block_bytes;
    struct statfs fs;

    block_bytes = fstatfs(image->fd, &fs) ? 0 : (uint64_t)fs.f_bsize;
    if (block_bytes > 64 * KiB || !is_power_of_2(block_bytes))
        block_bytes = 0; // what a network or so likes to move at once
    return (uint32_t)max_of(page_bytes, block_bytes);
}

static void image_check_direct(struct image *image)
{
    if (image->is_direct && image_ignores_direct(image))
        image->is_direct = false;
    image_align(image);
    if (!image->is_direct) {
        image->dio_offset_align = image->dio_mem_align = 1;
        if (!image->is_block_device)
            image->sector_bytes = image_punch_bytes(image);
        image_set_flag(image->fd, O_DIRECT, false);
    }
    image->is_sync = fcntl(image->fd, F_GETFL) & O_DSYNC; // O_SYNC includes it
}

// A second way to the file, past O_DIRECT, when its last block is a partial one.
static int image_open_tail(struct image *image, struct err *err)
{
    char path[32];

    if (image->buffered_fd >= 0 || !image->is_direct || image->is_read_only ||
        image->file_bytes % image->dio_offset_align == 0)
        return 0;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", image->fd);
    image->buffered_fd = open(path, O_RDWR | O_CLOEXEC);
    return image->buffered_fd < 0 ? err_set(err, -errno, "%s: %s", image->path, strerror(errno)) : 0;
}

int image_remeasure(struct image *next, const struct image *image, const struct image_options *options,
                    struct err *err)
{
    int ret;

    *next = *image;
    ret = image_measure(next, options, err);
    return ret < 0 ? ret : image_open_tail(next, err);
}

void image_take(struct image *image, const struct image *next)
{
    image->buffered_fd = next->buffered_fd;
    image->is_read_only = next->is_read_only;
    image->is_direct = next->is_direct;
    image->is_sync = next->is_sync;
    image->can_discard = next->can_discard;
    image->size_bytes = next->size_bytes;
    image->file_bytes = next->file_bytes;
    image->dio_offset_align = next->dio_offset_align;
    image->dio_mem_align = next->dio_mem_align;
    image->sector_bytes = next->sector_bytes;
}

int image_set_direct(struct image *next, const struct image *image, bool is_direct, struct err *err)
{
    int ret;

    *next = *image;
    ret = image_set_flag(image->fd, O_DIRECT, is_direct);
    next->is_direct = is_direct;
    if (!ret)
        image_check_direct(next);
    if (ret < 0 || next->is_direct != is_direct) {
        image_set_flag(image->fd, O_DIRECT, image->is_direct);
        return err_set(err, -EINVAL, "%s: its file system cannot do direct I/O; use io=buffered",
                       image->path);
    }
    return image_open_tail(next, err);
}

// Asked with what changes nothing: a hole behind the end, a range that is not aligned.
static bool image_can_discard(const struct image *image)
{
    uint64_t unaligned[2] = {1, 1};

    if (image->is_block_device)
        return ioctl(image->fd, BLKDISCARD, unaligned) < 0 && errno == EINVAL;
    return !fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      (off_t)round_up(image->file_bytes, 1 * MiB), 4096);
}

int image_open(struct image *image, const char *path, const struct image_options *options, struct err *err)
{
    char holder[64];
    int ret;

    *image = (struct image){.fd = -1, .buffered_fd = -1, .is_read_only = options->is_read_only};
    image->path = strdup(path);
    if (!image->path)
        return err_set(err, -ENOMEM, "%s: out of memory", path);
    ret = image_open_fd(image, options, err);
    if (ret < 0)
        goto out;
    ret = image_lock(image->fd, options->is_read_only);
    if (ret == -EAGAIN) {
        image_holder(image->fd, holder, sizeof(holder));
        err_set(err, ret, "%s: %s has it open for writing%s; detach it there first", path, holder,
                options->is_read_only ? "" : ", or for reading");
        goto out;
    }
    if (ret < 0)
        log_line("%s: cannot be locked (%s); take care that nobody else writes to it", path, strerror(-ret));
    ret = image_measure(image, options, err);
    if (ret < 0)
        goto out;
    ret = image_check_format(image, options, err);
    if (ret < 0)
        goto out;
    image_check_direct(image);
    ret = image_open_tail(image, err);
    if (ret < 0)
        goto out;
    image->can_discard = !image->is_read_only && image_can_discard(image);
    return 0;

out:
    image_close(image);
    return ret;
}

int image_set_extent_size_hint(const struct image *image, uint64_t bytes, struct err *err)
{
    struct fsxattr attr;

    if (!ioctl(image->fd, FS_IOC_FSGETXATTR, &attr)) {
        if ((attr.fsx_xflags & FS_XFLAG_EXTSIZE) && attr.fsx_extsize == bytes)
            return 0;
        attr.fsx_xflags |= FS_XFLAG_EXTSIZE;
        attr.fsx_extsize = (uint32_t)bytes;
        if (!ioctl(image->fd, FS_IOC_FSSETXATTR, &attr))
            return 0;
    }
    return err_set(
        err, -errno,
        "%s: --extent-size-hint: %s; XFS takes it on a file that has no blocks yet, use --writeback "
        "elsewhere",
        image->path, strerror(errno));
}

void image_close(struct image *image)
{
    if (image->buffered_fd >= 0)
        close(image->buffered_fd);
    if (image->fd >= 0) {
        if (!image->is_passed)
            image_unlock(image->fd);
        close(image->fd);
    }
    free(image->path);
    *image = (struct image){.fd = -1, .buffered_fd = -1};
}
