#include "control/partitions.h"

#include <blkid/blkid.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/blkpg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "util/util.h"

#define MAX_PARTITIONS 256 // as many as the kernel looks for

struct partition {
    int number;
    uint64_t start_sectors, size_sectors;
};

struct table {
    const char *device;
    int fd;
    struct partition partitions[MAX_PARTITIONS];
    unsigned nr;
};

// The logical partitions lie within an extended one, and the kernel lets none overlap: it is told of the
// first block of it, where a boot loader may be.
static uint64_t size_of(blkid_probe probe, blkid_partition partition)
{
    uint64_t size = (uint64_t)blkid_partition_get_size(partition);
    uint64_t block = max_of(2, blkid_probe_get_sectorsize(probe) / SECTOR_BYTES);

    return blkid_partition_is_extended(partition) ? min_of(size, block) : size;
}

static int table_read(struct table *table, struct err *err)
{
    blkid_probe probe = blkid_new_probe();
    blkid_partlist list = NULL;

    if (!probe || blkid_probe_set_device(probe, table->fd, 0, 0) < 0 ||
        blkid_probe_enable_superblocks(probe, 0) < 0 || blkid_probe_enable_partitions(probe, 1) < 0) {
        blkid_free_probe(probe);
        return err_set(err, -EIO, "%s: its partition table cannot be read", table->device);
    }
    list = blkid_probe_get_partitions(probe); // NULL: it has no table
    for (int i = 0; list && i < blkid_partlist_numof_partitions(list) && table->nr < MAX_PARTITIONS; i++) {
        blkid_partition partition = blkid_partlist_get_partition(list, i);

        table->partitions[table->nr++] = (struct partition){
            .number = blkid_partition_get_partno(partition),
            .start_sectors = (uint64_t)blkid_partition_get_start(partition),
            .size_sectors = size_of(probe, partition),
        };
    }
    blkid_free_probe(probe);
    return 0;
}

static int partition_call(const struct table *table, int op, const struct partition *partition)
{
    struct blkpg_partition data = {
        .start = (long long)(partition->start_sectors * SECTOR_BYTES),
        .length = (long long)(partition->size_sectors * SECTOR_BYTES),
        .pno = partition->number,
    };
    struct blkpg_ioctl_arg arg = {.op = op, .datalen = sizeof(data), .data = &data};

    return ioctl(table->fd, BLKPG, &arg) < 0 ? -errno : 0;
}

static uint64_t read_number(const char *folder, const char *name)
{
    char path[700], text[32] = "";
    FILE *file;

    snprintf(path, sizeof(path), "%s/%s", folder, name);
    file = fopen(path, "re");
    if (file && !fgets(text, sizeof(text), file))
        text[0] = '\0';
    if (file)
        fclose(file);
    return strtoull(text, NULL, 10);
}

static bool is_same(const struct partition *a, const struct partition *b)
{
    return a->number == b->number && a->start_sectors == b->start_sectors &&
           a->size_sectors == b->size_sectors;
}

// What the kernel has and the table has not goes. What both have is no longer in the table after this.
static void table_compare(struct table *table)
{
    const char *slash = strrchr(table->device, '/'), *name = slash ? slash + 1 : table->device;
    char folder[300], path[600];
    struct dirent *entry;
    DIR *dir;

    snprintf(folder, sizeof(folder), "/sys/block/%s", name);
    dir = opendir(folder);
    while (dir && (entry = readdir(dir))) {
        struct partition there;
        unsigned i;

        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        there = (struct partition){(int)read_number(path, "partition"), read_number(path, "start"),
                                   read_number(path, "size")};
        if (strncmp(entry->d_name, name, strlen(name)) || !there.number)
            continue;
        for (i = 0; i < table->nr && !is_same(&table->partitions[i], &there); i++)
            ;
        if (i < table->nr)
            table->partitions[i] = table->partitions[--table->nr];
        else if (partition_call(table, BLKPG_DEL_PARTITION, &there) < 0)
            log_line("%s: partition %d: %s; it stays as it was", table->device, there.number,
                     strerror(errno));
    }
    if (dir)
        closedir(dir);
}

int partitions_update(const char *device, struct err *err)
{
    struct table table = {.device = device, .fd = open(device, O_RDONLY | O_CLOEXEC)};
    int ret;

    if (table.fd < 0)
        return err_set(err, -errno, "%s: %s", device, strerror(errno));
    ret = table_read(&table, err);
    if (!ret)
        table_compare(&table);
    for (unsigned i = 0; !ret && i < table.nr; i++) {
        ret = partition_call(&table, BLKPG_ADD_PARTITION, &table.partitions[i]);
        if (ret < 0)
            err_set(err, ret, "%s: partition %d: %s; is its table in order?", device,
                    table.partitions[i].number, strerror(-ret));
    }
    close(table.fd);
    return ret;
}
