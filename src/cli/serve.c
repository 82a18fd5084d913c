// bight serve: one process, some images, in the foreground.

#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "cli/cli.h"
#include "core/device.h"
#include "core/stats.h"
#include "io/io.h"
#include "ring/ring.h"
#include "ring/workers.h"
#include "transport/transport.h"
#include "util/log.h"
#include "util/notify.h"
#include "util/util.h"

static const char serve_help[] =
    "usage: bight serve [OPTIONS] IMAGE... --nbd ADDR\n"
    "\n"
    "Serves IMAGE (a raw file or a block device) in the foreground, until SIGTERM, SIGINT or SIGHUP.\n"
    "Several images are several NBD exports, by name; the first is also the default one.\n"
    "\n"
    "  --nbd ADDR           listen on unix:PATH or HOST:PORT; may be repeated\n"
    "  --name NAME          export name (default: the file's name); one for each image, in order\n"
    "  --read-only          refuse every write\n"
    "  --io IO              direct (default), buffered, null, or fault:SPEC\n"
    "  --map MAP            linear\n"
    "  --offset BYTES       the device begins there in the image\n"
    "  --size-limit BYTES   the device is no longer than this\n"
    "  --block-size BYTES   512 to 4096: the smallest request (default: any byte)\n"
    "  --format raw         serve the bytes as they are, whatever they look like\n"
    "  --queues N           threads that serve requests (default: CPUs, at most 4)\n"
    "  --depth N            requests in flight for each connection (default 128)\n"
    "  --workers N          threads for what blocks (default 16); 1 with --io buffered is the\n"
    "                       single-threaded loop\n"
    "  --connections N      NBD connections at a time (default 1000)\n"
    "  --ring RING          auto (default), uring or threads\n"
    "  -v, --verbose        tell what is going on\n"
    "  -h, --help\n"
    "\n"
    "Sizes take K, M, G, T. SIGUSR1 prints the counters. See bight-serve(1).\n";

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
    OPT_QUEUES,
    OPT_DEPTH,
    OPT_WORKERS,
    OPT_CONNECTIONS,
    OPT_RING,
};

static const struct option serve_options[] = {
    {"nbd", required_argument, NULL, OPT_TRANSPORT},
    {"name", required_argument, NULL, OPT_NAME},
    {"read-only", no_argument, NULL, OPT_READ_ONLY},
    {"io", required_argument, NULL, OPT_IO},
    {"map", required_argument, NULL, OPT_MAP},
    {"offset", required_argument, NULL, OPT_OFFSET},
    {"size-limit", required_argument, NULL, OPT_SIZE_LIMIT},
    {"block-size", required_argument, NULL, OPT_BLOCK_SIZE},
    {"format", required_argument, NULL, OPT_FORMAT},
    {"queues", required_argument, NULL, OPT_QUEUES},
    {"depth", required_argument, NULL, OPT_DEPTH},
    {"workers", required_argument, NULL, OPT_WORKERS},
    {"connections", required_argument, NULL, OPT_CONNECTIONS},
    {"ring", required_argument, NULL, OPT_RING},
    {"verbose", no_argument, NULL, 'v'},
    {"help", no_argument, NULL, 'h'},
    {NULL, 0, NULL, 0},
};

struct serve {
    struct device_options device;
    const char *ring_name;
    unsigned max_connections, nr_workers;
    struct transport_addrs addrs[TRANSPORT_NR];
    const char **names, **images; // argc entries are room for all, as in addrs
    unsigned nr_names, nr_images;

    struct device **devs;
    unsigned nr_devs;
    struct ring *ring;
    struct transport_set transports;
    int signal_fd;
    struct ring_op signal_op;
    bool is_stopping;
};

// ---- Options

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

static int serve_option(struct serve *serve, int option, const char *arg, struct err *err)
{
    struct device_options *device = &serve->device;

    if (option >= OPT_TRANSPORT && option < OPT_TRANSPORT + TRANSPORT_NR) {
        struct transport_addrs *addrs = &serve->addrs[option - OPT_TRANSPORT];

        addrs->addrs[addrs->nr_addrs++] = arg;
        return 0;
    }
    switch (option) {
    case OPT_NAME:
        serve->names[serve->nr_names++] = arg;
        if (!*arg || strlen(arg) > DEVICE_NAME_MAX)
            return err_usage(err, "--name: %s: use 1 to %u bytes", *arg ? "too long" : "empty",
                             DEVICE_NAME_MAX);
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
    case OPT_QUEUES:
        return parse_count("queues", arg, 64, &device->nr_queues, err);
    case OPT_DEPTH:
        return parse_count("depth", arg, 4096, &device->depth, err);
    case OPT_WORKERS:
        return parse_count("workers", arg, 256, &serve->nr_workers, err);
    case OPT_CONNECTIONS:
        return parse_count("connections", arg, 100000, &serve->max_connections, err);
    case OPT_RING:
        serve->ring_name = arg;
        return 0;
    case 'v':
        log_is_verbose = true;
        return 0;
    default:
        return -EINVAL; // getopt has said why
    }
}

// 0: go on. 1: help was asked for. A negative errno: usage.
static int serve_parse(struct serve *serve, int argc, char **argv, struct err *err)
{
    int option, ret;

    opterr = 0; // one line, in our own words
    while ((option = getopt_long(argc, argv, ":vh", serve_options, NULL)) != -1) {
        if (option == 'h')
            return 1;
        if (option == '?' && optopt)
            return err_usage(err, "-%c: no such option; see bight serve --help", optopt);
        if (option == '?')
            return err_usage(err, "%s: no such option; see bight serve --help", argv[optind - 1]);
        if (option == ':')
            return err_usage(err, "%s: needs a value; see bight serve --help", argv[optind - 1]);
        ret = serve_option(serve, option, optarg, err);
        if (ret < 0)
            return ret;
    }
    for (; optind < argc; optind++)
        serve->images[serve->nr_images++] = argv[optind];
    if (!serve->nr_images)
        return err_usage(err, "no IMAGE is named; see bight serve --help");
    if (serve->nr_names > serve->nr_images)
        return err_usage(err, "--name: more names than images; give one for each IMAGE");
    return 0;
}

static const char *serve_name(const struct serve *serve, unsigned i)
{
    const char *slash = strrchr(serve->images[i], '/');

    if (i < serve->nr_names)
        return serve->names[i];
    return slash && slash[1] ? slash + 1 : serve->images[i];
}

static int serve_check_names(const struct serve *serve, struct err *err)
{
    for (unsigned i = 0; i < serve->nr_images; i++) {
        for (unsigned j = 0; j < i; j++) {
            if (!strcmp(serve_name(serve, i), serve_name(serve, j)))
                return err_usage(err, "%s: two exports would be called %s; use --name for each",
                                 serve->images[i], serve_name(serve, i));
        }
    }
    return 0;
}

// ---- Running

// All lines in one write: who reads them sees all or none.
static void serve_print_stats(const struct serve *serve)
{
    char *text = NULL;
    size_t len = 0;
    FILE *file = open_memstream(&text, &len);

    if (!file)
        return;
    for (unsigned i = 0; i < serve->nr_devs; i++)
        stats_print(serve->devs[i], file);
    fclose(file);
    fputs(text, stderr);
    free(text);
}

static void serve_signalled(struct ring_op *op, int res)
{
    struct serve *serve = container_of(op, struct serve, signal_op);
    struct signalfd_siginfo info;

    (void)res;
    while (read(serve->signal_fd, &info, sizeof(info)) == sizeof(info)) {
        if (info.ssi_signo == SIGUSR1) {
            serve_print_stats(serve);
        } else if (!serve->is_stopping) {
            log_verbose("signal %u: stopping", info.ssi_signo);
            notify_send("STOPPING=1");
            serve->is_stopping = true;
            transports_stop(&serve->transports);
        }
    }
    ring_queue(serve->ring, op);
}

static int serve_catch_signals(struct serve *serve, struct err *err)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP); // the terminal has gone: what is cached must not go with it
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    serve->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (serve->signal_fd < 0)
        return err_set(err, -errno, "signalfd: %s", strerror(errno));
    serve->signal_op = (struct ring_op){.done = serve_signalled,
                                        .code = RING_POLL,
                                        .fd = serve->signal_fd,
                                        .events = POLLIN};
    return 0;
}

static int serve_create_devices(struct serve *serve, struct err *err)
{
    for (; serve->nr_devs < serve->nr_images; serve->nr_devs++) {
        struct device *dev;
        int ret;

        serve->device.name = serve_name(serve, serve->nr_devs);
        ret = device_create(&dev, serve->images[serve->nr_devs], &serve->device, err);
        if (ret < 0)
            return ret;
        serve->devs[serve->nr_devs] = dev;
        log_verbose("%s: %s, %llu bytes, io %s, map %s, %u queues%s", dev->name, dev->image->path,
                    (unsigned long long)dev->limits.size_bytes, dev->io->ops->name, dev->map->ops->name,
                    dev->nr_queues, dev->image->is_read_only ? ", read-only" : "");
    }
    return 0;
}

// Everything that was created, in reverse. 0, or the error of a last flush.
static int serve_destroy_devices(struct serve *serve)
{
    int ret = 0;

    for (unsigned i = 0; i < serve->nr_devs; i++) {
        int error = device_stop(serve->devs[i]);

        if (error < 0) {
            log_line("%s: flushing: %s; what was written last may be lost", serve->devs[i]->name,
                     strerror(-error));
            ret = error;
        }
    }
    workers_stop(); // R5 of ring/ring.h: nobody posts any more
    for (unsigned i = 0; i < serve->nr_devs; i++)
        device_destroy(serve->devs[i]);
    return ret;
}

static int serve_loop(struct serve *serve, struct err *err)
{
    while (serve->transports.nr_running) {
        int ret = ring_run(serve->ring);
        if (ret < 0)
            return err_set(err, ret, "main ring: %s", strerror(-ret));
    }
    return 0;
}

static int serve_hold(struct serve *serve, struct transport_holds *holds, struct err *err)
{
    unsigned nr_listen_fds = notify_listen_fds();
    int listen_fds[TRANSPORT_MAX_FDS], ret;

    nr_listen_fds = min_of(nr_listen_fds, TRANSPORT_MAX_FDS);
    for (unsigned i = 0; i < nr_listen_fds; i++)
        listen_fds[i] = NOTIFY_FIRST_FD + (int)i;
    ret = transports_hold(holds, serve->addrs, listen_fds, nr_listen_fds,
                          &(struct transport_hold_options){.nr_queues = serve->device.nr_queues,
                                                           .depth = serve->device.depth,
                                                           .is_read_only = serve->device.image.is_read_only},
                          err);
    if (!ret && !holds->nr_holds)
        ret = err_usage(err, "no transport is named; use --nbd unix:PATH or HOST:PORT");
    return ret;
}

static int serve_run(struct serve *serve, struct err *err)
{
    struct transport_holds holds;
    int ret, flush_ret;

    workers_set_max(serve->nr_workers);
    serve->device.ring = ring_choose(serve->ring_name, err);
    if (!serve->device.ring)
        return -EINVAL;
    ret = serve_catch_signals(serve, err);
    if (ret < 0)
        return ret;
    ret = serve_hold(serve, &holds, err);
    if (ret < 0)
        goto out_signals;
    ret = serve_create_devices(serve, err);
    if (ret < 0)
        goto out_devices;
    ret = ring_create(serve->device.ring, &serve->ring, err);
    if (ret < 0)
        goto out_devices;
    ret = transports_start(&serve->transports,
                           &(struct transport_options){
                               .devs = serve->devs,
                               .nr_devs = serve->nr_devs,
                               .max_connections = serve->max_connections,
                               .ring = serve->ring,
                           },
                           &holds, err);
    if (ret < 0) {
        transports_stop(&serve->transports);
        serve_loop(serve, &(struct err){.line = ""});
        goto out_transports;
    }
    ring_queue(serve->ring, &serve->signal_op);
    notify_send("READY=1");
    log_verbose("ready");
    ret = serve_loop(serve, err);
out_transports:
    flush_ret = serve_destroy_devices(serve);
    ring_destroy(serve->ring);
    transports_destroy(&serve->transports);
    if (!ret && flush_ret) {
        err->line[0] = '\0'; // said already, for each device
        ret = flush_ret;
    }
    goto out_holds;
out_devices:
    serve_destroy_devices(serve);
out_holds:
    transports_release(&holds);
out_signals:
    close(serve->signal_fd);
    return ret;
}

static unsigned default_queues(void)
{
    long nr_cpus = sysconf(_SC_NPROCESSORS_ONLN);

    return (unsigned)max_of(1, min_of(nr_cpus, 4));
}

static int serve_main(int argc, char **argv)
{
    struct serve serve = {
        .device = {.io = "direct", .map = "linear", .nr_queues = default_queues(), .depth = 128},
        .ring_name = "auto",
        .max_connections = 1000,
        .nr_workers = 16,
    };
    struct err err = {.line = ""};
    int status = CLI_ERROR, ret;
    bool is_complete = true;

    for (unsigned i = 0; i < TRANSPORT_NR; i++)
        is_complete &= !!(serve.addrs[i].addrs = calloc((size_t)argc, sizeof(*serve.addrs[i].addrs)));
    serve.names = calloc((size_t)argc, sizeof(*serve.names));
    serve.images = calloc((size_t)argc, sizeof(*serve.images));
    serve.devs = calloc((size_t)argc, sizeof(*serve.devs));
    if (!is_complete || !serve.names || !serve.images || !serve.devs) {
        log_line("out of memory");
        goto out;
    }
    ret = serve_parse(&serve, argc, argv, &err);
    if (ret == 1) {
        fputs(serve_help, stdout);
        status = CLI_OK;
        goto out;
    }
    if (!ret)
        ret = serve_check_names(&serve, &err);
    if (ret < 0) {
        log_line("%s", err.line);
        status = CLI_USAGE;
        goto out;
    }
    ret = serve_run(&serve, &err);
    if (ret < 0 && err.line[0])
        log_line("%s", err.line);
    status = err.is_usage ? CLI_USAGE : ret < 0 ? CLI_ERROR : CLI_OK;
out:
    for (unsigned i = 0; i < TRANSPORT_NR; i++)
        free(serve.addrs[i].addrs);
    free(serve.names);
    free(serve.images);
    free(serve.devs);
    return status;
}

const struct cli_command cli_serve = {
    .name = "serve",
    .summary = "serve images over NBD, in the foreground",
    .help = serve_help,
    .run = serve_main,
};
