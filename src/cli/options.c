#include "cli/options.h"

#include <errno.h>
#include <getopt.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/io.h"
#include "util/log.h"
#include "util/notify.h"
#include "util/util.h"
#include "writeback/writeback.h"

enum {
    OPT_TRANSPORT = 256, // and those of transport_table[1...]
    OPT_NAME = OPT_TRANSPORT + TRANSPORT_NR,
    OPT_READ_ONLY,
    OPT_IO,
    OPT_MAP,
    OPT_OFFSET,
    OPT_SIZE_LIMIT,
    OPT_BLOCK_SIZE,
    OPT_FORMAT,
    OPT_WRITEBACK,
    OPT_ALLOCATION_UNIT,
    OPT_EXTENT_SIZE_HINT,
    OPT_QUEUES,
    OPT_DEPTH,
    OPT_WORKERS,
    OPT_CONNECTIONS,
    OPT_POLL_US,
    OPT_RING,
    OPT_JSON,
    OPT_FOREGROUND,
    OPT_METRICS,
    OPT_PARTSCAN,
    OPT_PASSTHROUGH,
};

#define OPTIONS_BOTH (OPTIONS_SERVE | OPTIONS_ATTACH)

static const struct {
    struct option option;
    unsigned commands; // that take it
} options_table[] = {
    {{"nbd", required_argument, NULL, OPT_TRANSPORT}, OPTIONS_BOTH},
    {{"ublk", optional_argument, NULL, OPT_TRANSPORT + 1}, OPTIONS_BOTH},
    {{"vhost-user", required_argument, NULL, OPT_TRANSPORT + 2}, OPTIONS_BOTH},
    {{"fuse", required_argument, NULL, OPT_TRANSPORT + 3}, OPTIONS_BOTH},
    {{"name", required_argument, NULL, OPT_NAME}, OPTIONS_BOTH},
    {{"passthrough", no_argument, NULL, OPT_PASSTHROUGH}, OPTIONS_BOTH},
    {{"read-only", no_argument, NULL, OPT_READ_ONLY}, OPTIONS_BOTH},
    {{"io", required_argument, NULL, OPT_IO}, OPTIONS_BOTH},
    {{"map", required_argument, NULL, OPT_MAP}, OPTIONS_BOTH},
    {{"offset", required_argument, NULL, OPT_OFFSET}, OPTIONS_BOTH},
    {{"size-limit", required_argument, NULL, OPT_SIZE_LIMIT}, OPTIONS_BOTH},
    {{"block-size", required_argument, NULL, OPT_BLOCK_SIZE}, OPTIONS_BOTH},
    {{"format", required_argument, NULL, OPT_FORMAT}, OPTIONS_BOTH},
    {{"writeback", optional_argument, NULL, OPT_WRITEBACK}, OPTIONS_BOTH},
    {{"allocation-unit", required_argument, NULL, OPT_ALLOCATION_UNIT}, OPTIONS_BOTH},
    {{"extent-size-hint", required_argument, NULL, OPT_EXTENT_SIZE_HINT}, OPTIONS_BOTH},
    {{"queues", required_argument, NULL, OPT_QUEUES}, OPTIONS_BOTH},
    {{"depth", required_argument, NULL, OPT_DEPTH}, OPTIONS_BOTH},
    {{"workers", required_argument, NULL, OPT_WORKERS}, OPTIONS_BOTH},
    {{"connections", required_argument, NULL, OPT_CONNECTIONS}, OPTIONS_BOTH},
    {{"poll-us", required_argument, NULL, OPT_POLL_US}, OPTIONS_BOTH},
    {{"ring", required_argument, NULL, OPT_RING}, OPTIONS_BOTH},
    {{"json", no_argument, NULL, OPT_JSON}, OPTIONS_ATTACH},
    {{"foreground", no_argument, NULL, OPT_FOREGROUND}, OPTIONS_ATTACH},
    {{"partscan", no_argument, NULL, OPT_PARTSCAN}, OPTIONS_ATTACH},
    {{"metrics", required_argument, NULL, OPT_METRICS}, OPTIONS_ATTACH},
    {{"verbose", no_argument, NULL, 'v'}, OPTIONS_BOTH},
    {{"help", no_argument, NULL, 'h'}, OPTIONS_BOTH},
};

static int parse_size(const char *option, const char *text, uint64_t *bytes, struct err *err)
{
    if (util_parse_size(text, bytes) < 0)
        return err_usage(err, "--%s: %s: no size; use digits with K, M, G or T", option, text);
    return 0;
}

static int parse_count(const char *option, const char *text, unsigned max, unsigned *count, struct err *err)
{
    unsigned long n;

    if (util_parse_uint(text, 1, max, &n) < 0)
        return err_usage(err, "--%s: %s: out of range; use 1 to %u", option, text, max);
    *count = (unsigned)n;
    return 0;
}

static int parse_block_size(const char *text, uint32_t *bytes, struct err *err)
{
    uint64_t n;

    if (util_parse_size(text, &n) < 0 || n < 512 || n > 4096 || !is_power_of_2(n))
        return err_usage(err, "--block-size: %s: use 512, 1024, 2048 or 4096", text);
    *bytes = (uint32_t)n;
    return 0;
}

static int parse_unit(const char *option, const char *text, uint64_t max, uint64_t *bytes, struct err *err)
{
    if (util_parse_size(text, bytes) < 0 || *bytes < 4096 || *bytes > max || !is_power_of_2(*bytes))
        return err_usage(err, "--%s: %s: use a power of two from 4K to %lluG", option, text,
                         (unsigned long long)(max >> 30));
    return 0;
}

static int options_take(struct options *options, int option, const char *arg, struct err *err)
{
    struct device_options *device = &options->device;
    unsigned long n;

    if (option >= OPT_TRANSPORT && option < OPT_TRANSPORT + TRANSPORT_NR) {
        struct transport_addrs *addrs = &options->addrs[option - OPT_TRANSPORT];

        addrs->addrs[addrs->nr_addrs++] = arg ? arg : "";
        return 0;
    }
    switch (option) {
    case OPT_NAME:
        options->names[options->nr_names++] = arg;
        if (!*arg || strlen(arg) > DEVICE_NAME_MAX)
            return err_usage(err, "--name: %s: use 1 to %u bytes", *arg ? "too long" : "empty",
                             DEVICE_NAME_MAX);
        return 0;
    case OPT_PASSTHROUGH:
        device->is_passthrough = true;
        return 0;
    case OPT_READ_ONLY:
        device->image.is_read_only = true;
        return 0;
    case OPT_IO:
        device->io = arg;
        return 0;
    case OPT_MAP:
        device->map = arg;
        return 0;
    case OPT_OFFSET:
        return parse_size("offset", arg, &device->image.offset_bytes, err);
    case OPT_SIZE_LIMIT:
        return parse_size("size-limit", arg, &device->image.size_limit_bytes, err);
    case OPT_BLOCK_SIZE:
        return parse_block_size(arg, &device->block_bytes, err);
    case OPT_FORMAT:
        if (strcmp(arg, "raw"))
            return err_usage(err, "--format: %s: not known; use raw", arg);
        device->image.is_format_raw = true;
        return 0;
    case OPT_WRITEBACK:
        if (writeback_parse(arg ? arg : "on", &device->writeback_bytes) < 0)
            return err_usage(err, "--writeback: %s: use a size from 1M to 1T, or none for 64M", arg);
        return 0;
    case OPT_ALLOCATION_UNIT:
        return parse_unit("allocation-unit", arg, 1024 * MiB, &device->allocation_unit_bytes, err);
    case OPT_EXTENT_SIZE_HINT:
        return parse_unit("extent-size-hint", arg, 1024 * MiB, &device->extent_size_hint_bytes, err);
    case OPT_QUEUES:
        return parse_count("queues", arg, 64, &device->nr_queues, err);
    case OPT_DEPTH:
        return parse_count("depth", arg, 4096, &device->depth, err);
    case OPT_WORKERS:
        return parse_count("workers", arg, 256, &options->nr_workers, err);
    case OPT_CONNECTIONS:
        return parse_count("connections", arg, 100000, &options->max_connections, err);
    case OPT_POLL_US:
        if (util_parse_uint(arg, 0, 1000000, &n) < 0)
            return err_usage(err, "--poll-us: %s: out of range; use 0 to 1000000", arg);
        options->poll_us = (unsigned)n;
        return 0;
    case OPT_RING:
        options->ring_name = arg;
        return 0;
    case OPT_JSON:
        options->is_json = true;
        return 0;
    case OPT_FOREGROUND:
        options->is_foreground = true;
        return 0;
    case OPT_PARTSCAN:
        options->is_partscan = true;
        return 0;
    case OPT_METRICS:
        options->metrics = arg;
        return 0;
    case 'v':
        log_is_verbose = true;
        return 0;
    default:
        return -EINVAL; // there is no such row
    }
}

static int options_getopt(struct options *options, enum options_command command, int argc, char **argv,
                          struct err *err)
{
    struct option table[ARRAY_SIZE(options_table) + 1] = {0};
    int option, ret, nr = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(options_table); i++) {
        if (options_table[i].commands & command)
            table[nr++] = options_table[i].option;
    }
    opterr = 0; // one line, in our own words
    while ((option = getopt_long(argc, argv, ":vh", table, NULL)) != -1) {
        if (option == 'h')
            return 1;
        if (option == '?' && optopt)
            return err_usage(err, "-%c: no such option; see bight %s --help", optopt, argv[0]);
        if (option == '?')
            return err_usage(err, "%s: no such option; see bight %s --help", argv[optind - 1], argv[0]);
        if (option == ':')
            return err_usage(err, "%s: needs a value; see bight %s --help", argv[optind - 1], argv[0]);
        ret = options_take(options, option, optarg, err);
        if (ret < 0)
            return ret;
    }
    for (; optind < argc; optind++)
        options->images[options->nr_images++] = argv[optind];
    if (!options->nr_images)
        return err_usage(err, "no IMAGE is named; see bight %s --help", argv[0]);
    if (options->nr_names > options->nr_images)
        return err_usage(err, "--name: more names than images; give one for each IMAGE");
    return 0;
}

static unsigned default_queues(void)
{
    long nr_cpus = sysconf(_SC_NPROCESSORS_ONLN);

    return (unsigned)max_of(1, min_of(nr_cpus, 4));
}

int options_parse(struct options *options, enum options_command command, int argc, char **argv,
                  struct err *err)
{
    bool is_complete = true;

    *options = (struct options){
        .command = command,
        .device = {.io = "direct", .map = "linear", .nr_queues = default_queues(), .depth = 128},
        .ring_name = "auto",
        .max_connections = 1000,
        .nr_workers = 16,
        .poll_us = 64,
        .names = calloc((size_t)argc, sizeof(*options->names)),
        .images = calloc((size_t)argc, sizeof(*options->images)),
    };
    for (unsigned i = 0; i < TRANSPORT_NR; i++) {
        options->addrs[i].addrs = calloc((size_t)argc, sizeof(*options->addrs[i].addrs));
        is_complete &= !!options->addrs[i].addrs;
    }
    if (!is_complete || !options->names || !options->images)
        return err_set(err, -ENOMEM, "out of memory");
    return options_getopt(options, command, argc, argv, err);
}

void options_free(struct options *options)
{
    for (unsigned i = 0; i < TRANSPORT_NR; i++)
        free(options->addrs[i].addrs);
    free(options->names);
    free(options->images);
}

const char *options_name(const struct options *options, unsigned i)
{
    const char *slash = strrchr(options->images[i], '/');

    if (i < options->nr_names)
        return options->names[i];
    return slash && slash[1] ? slash + 1 : options->images[i];
}

struct transport_addrs *options_addrs_of(struct options *options, const struct transport_ops *ops)
{
    unsigned i = 0;

    while (transport_table[i] != ops)
        i++;
    return &options->addrs[i];
}

int options_hold(struct options *options, struct transport_holds *holds, struct err *err)
{
    unsigned nr_listen_fds = notify_listen_fds();
    int listen_fds[TRANSPORT_MAX_FDS];

    if (options->device.is_passthrough && !options_addrs_of(options, &fuse_transport_ops)->nr_addrs)
        return err_usage(err, "--passthrough: is for FUSE; add --fuse PATH");
    if (options->device.is_passthrough && geteuid())
        return err_set(err, -EPERM, "--passthrough: the kernel lets only root; leave it out");
    nr_listen_fds = min_of(nr_listen_fds, TRANSPORT_MAX_FDS);
    for (unsigned i = 0; i < nr_listen_fds; i++)
        listen_fds[i] = NOTIFY_FIRST_FD + (int)i;
    return transports_hold(
        holds, options->addrs, listen_fds, nr_listen_fds,
        &(struct transport_hold_options){.images = options->images,
                                         .nr_images = options->nr_images,
                                         .ring_name = options->ring_name,
                                         .nr_queues = options->device.nr_queues,
                                         .depth = options->device.depth,
                                         .is_read_only = options->device.image.is_read_only,
                                         .is_direct = io_wants_direct(options->device.io) &&
                                                      !options->device.writeback_bytes,
                                         .is_supervised = options->command == OPTIONS_ATTACH,
                                         .is_passthrough = options->device.is_passthrough},
        err);
}
