// map_load: what a look-up of fastfs costs, map_extent(may_block = false), and what its map takes.
//
// Without a file: a made-up one of --extents pieces of --bytes each, no two of them adjacent on the device.
// With one: its regions are filled by FIEMAP from its beginning to its end, as the keeper does. Prints one
// line of JSON.

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/image.h"
#include "map/fastfs.h"
#include "map/fiemap.h"
#include "util/util.h"

static const char usage_text[] = "usage: map_load [OPTIONS] [FILE]\n"
                                 "\n"
                                 "  --extents N        how many (1000000)\n"
                                 "  --bytes N          of each of them (4K)\n"
                                 "  --lookups N        (10000000)\n";

struct options {
    uint64_t nr_extents, extent_bytes, nr_lookups;
};

// As FIEMAP would tell it.
static struct extents *make_extents(const struct options *options, uint64_t start_bytes)
{
    struct extents_build build = {.max_extents = 8, .known_bytes = UINT64_MAX};

    build.extents = calloc(1, sizeof(*build.extents) + build.max_extents * sizeof(build.extents->at[0]));
    if (!build.extents)
        exit(EXIT_FAILURE);
    for (uint64_t at = start_bytes; at < start_bytes + REGION_BYTES; at += options->extent_bytes) {
        struct file_extent ext = {at, options->extent_bytes, FILE_WRITTEN, 2 * at};

        if (extents_take(&build, &ext) < 0)
            exit(EXIT_FAILURE);
    }
    return realloc(build.extents,
                   sizeof(*build.extents) + (build.extents->nr_extents + 1) * sizeof(build.extents->at[0]));
}

static void fill(struct fastfs *fastfs, const struct options *options, int fd)
{
    struct region *region;
    int ret = 0;

    for (uint64_t i = 0; i < fastfs->extents.nr_regions && !ret; i++) {
        struct extents *extents = NULL;

        extent_map_begin_fill(&fastfs->extents, i, &region);
        if (fd < 0)
            extents = make_extents(options, i * REGION_BYTES);
        else
            ret = extents_read(&extents, fd, i, UINT64_MAX, fastfs->place.block_bytes);
        if (!region || (!ret && !extents))
            ret = -ENOMEM;
        if (ret)
            break;
        atomic_store(&region->extents, extents);
        fastfs->sums.nr_extents += extents->nr_device;
    }
    if (ret) {
        fprintf(stderr, "map_load: %s\n", strerror(-ret));
        exit(EXIT_FAILURE);
    }
}

static double look_up(struct fastfs *fastfs, uint64_t nr_lookups, bool is_random)
{
    uint64_t seed = 88172645463325252, nr_blocks = fastfs->map.image->size_bytes / (4 * KiB), sum = 0;
    uint64_t start_ns = util_now_ns();

    for (uint64_t i = 0; i < nr_lookups; i++) {
        struct extent ext;

        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        if (map_extent(&fastfs->map, (is_random ? seed : i) % nr_blocks * 4 * KiB, 4 * KiB, false, false,
                       &ext) < 0)
            exit(EXIT_FAILURE);
        sum += ext.offset_bytes;
    }
    if (sum == 1) // it is used
        puts("");
    return (double)(util_now_ns() - start_ns) / (double)nr_lookups;
}

static void measure(const struct options *options, const char *path)
{
    struct image image = {.fd = -1, .file_bytes = options->nr_extents * options->extent_bytes};
    struct fastfs fastfs = {
        .map = {.ops = &map_fastfs_ops, .image = &image, .device_fd = -1},
        .place.block_bytes = 512, // of any file system a divisor
        .redirect_until_ns = UINT64_MAX,
    };
    size_t before = mallinfo2().uordblks + mallinfo2().hblkhd;
    uint64_t start_ns, fill_ns;
    struct stat st;

    if (path) {
        image.fd = open(path, O_RDONLY | O_CLOEXEC);
        if (image.fd < 0 || fstat(image.fd, &st) < 0) {
            fprintf(stderr, "map_load: %s: %s\n", path, strerror(errno));
            exit(EXIT_FAILURE);
        }
        image.file_bytes = (uint64_t)st.st_size;
    }
    image.size_bytes = image.file_bytes;
    if (extent_map_create(&fastfs.extents, image.file_bytes) < 0)
        exit(EXIT_FAILURE);
    start_ns = util_now_ns();
    fill(&fastfs, options, image.fd);
    fill_ns = util_now_ns() - start_ns;
    printf("{\"extents\": %llu, \"fill_ns_each\": %.1f, \"bytes_each\": %.1f, ",
           (unsigned long long)fastfs.sums.nr_extents,
           (double)fill_ns / (double)max_of(fastfs.sums.nr_extents, 1U),
           (double)(mallinfo2().uordblks + mallinfo2().hblkhd - before) /
               (double)max_of(fastfs.sums.nr_extents, 1U));
    printf("\"random_ns\": %.1f, ", look_up(&fastfs, options->nr_lookups, true));
    printf("\"sequential_ns\": %.1f}\n", look_up(&fastfs, options->nr_lookups, false));
    extent_map_destroy(&fastfs.extents);
    if (image.fd >= 0)
        close(image.fd);
}

int main(int argc, char **argv)
{
    static const struct option table[] = {
        {"extents", required_argument, NULL, 'e'},
        {"bytes", required_argument, NULL, 'b'},
        {"lookups", required_argument, NULL, 'l'},
        {"help", no_argument, NULL, 'h'},
        {NULL, 0, NULL, 0},
    };
    struct options options = {.nr_extents = 1000000, .extent_bytes = 4 * KiB, .nr_lookups = 10000000};
    int option;

    while ((option = getopt_long(argc, argv, "", table, NULL)) != -1) {
        uint64_t *value = option == 'e'   ? &options.nr_extents
                          : option == 'b' ? &options.extent_bytes
                                          : &options.nr_lookups;

        if (option == 'h') {
            fputs(usage_text, stdout);
            return EXIT_SUCCESS;
        }
        if (option == '?' || util_parse_size(optarg, value) < 0 || !*value) {
            fputs(usage_text, stderr);
            return 2;
        }
    }
    measure(&options, argv[optind]);
    return EXIT_SUCCESS;
}
