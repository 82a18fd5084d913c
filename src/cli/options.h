// The command line of what serves images: bight serve and bight attach.
#pragma once

#include <stdbool.h>

#include "core/device.h"
#include "transport/transport.h"

// Of --help: what both take.
#define OPTIONS_HELP                                                                               \
    "  --nbd ADDR           listen on unix:PATH or HOST:PORT; may be repeated\n"                   \
    "  --ublk[=ID]          be the block device /dev/ublkbID (default: a free one); may be\n"      \
    "                       repeated: the n-th is the n-th image\n"                                \
    "  --vhost-user PATH    serve virtual machines over this unix socket: the first image, as a\n" \
    "                       virtio disk; may be repeated\n"                                        \
    "  --fuse PATH          be this file, which is made where there is none; may be repeated:\n"   \
    "                       the n-th is the n-th image\n"                                          \
    "  --passthrough        the kernel reads and writes the image by that file without us: as\n"   \
    "                       fast as losetup, and no set and switch\n"                              \
    "  --read-only          refuse every write\n"                                                  \
    "  --io IO              direct (default), buffered, null, or fault:SPEC\n"                     \
    "  --map MAP            linear (default) or fastfs\n"                                          \
    "  --offset BYTES       the device begins there in the image\n"                                \
    "  --size-limit BYTES   the device is no longer than this\n"                                   \
    "  --block-size BYTES   512 to 4096: the smallest request (default: any byte)\n"               \
    "  --format raw         serve the bytes as they are, whatever they look like\n"                \
    "  --writeback[=SIZE]   cache writes in SIZE of memory (64M), and allocate in large pieces\n"  \
    "  --allocation-unit N  what --writeback rounds allocations to, 4K to 1G (1M)\n"               \
    "  --extent-size-hint N have XFS allocate in pieces of N: the simpler remedy\n"                \
    "  --queues N           threads that serve requests (default: CPUs, at most 4)\n"              \
    "  --depth N            requests in flight for each connection (default 128)\n"                \
    "  --workers N          threads for what blocks (default 16); 1 with --io buffered is the\n"   \
    "                       single-threaded loop\n"                                                \
    "  --connections N      NBD connections at a time (default 1000)\n"                            \
    "  --poll-us N          vhost-user: how long to look for more before sleeping (default 64)\n"  \
    "  --ring RING          auto (default), uring or threads\n"                                    \
    "  -v, --verbose        tell what is going on\n"                                               \
    "  -h, --help\n"

enum options_command {
    OPTIONS_SERVE = 1 << 0,
    OPTIONS_ATTACH = 1 << 1,
};

struct options {
    enum options_command command;
    struct device_options device;
    const char *ring_name;
    unsigned max_connections, nr_workers, poll_us;
    struct transport_addrs addrs[TRANSPORT_NR];
    const char **names, **images; // room for all arguments, as in addrs
    unsigned nr_names, nr_images;
    // bight attach only.
    bool is_json, is_foreground, is_partscan;
    const char *metrics;
};

// Parses argv[1...] of that command; options_free() in any case. 0: go on. 1: help was asked for. A
// negative errno: wrong usage, with err set.
int options_parse(struct options *options, enum options_command command, int argc, char **argv,
                  struct err *err);
void options_free(struct options *options);

// Those of that transport.
struct transport_addrs *options_addrs_of(struct options *options, const struct transport_ops *ops);

// The name of the i-th image: --name, or the end of its path.
const char *options_name(const struct options *options, unsigned i);

// Opens all that is to be served to: the transports' addresses, and LISTEN_FDS. 0, or a negative errno with
// err set and nothing held.
int options_hold(struct options *options, struct transport_holds *holds, struct err *err);
