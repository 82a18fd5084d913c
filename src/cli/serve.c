// bight serve: one process, some images, in the foreground.

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "cli/options.h"
#include "control/worker.h"
#include "util/log.h"
#include "util/notify.h"
#include "util/util.h"

// clang-format off
static const char serve_help[] =
    "usage: bight serve [OPTIONS] IMAGE... --nbd ADDR\n"
    "\n"
    "Serves IMAGE (a raw file or a block device) in the foreground, until SIGTERM, SIGINT or SIGHUP.\n"
    "Several images are several NBD exports, by name; the first is also the default one.\n"
    "\n"
    "  --name NAME          export name (default: the file's name); one for each image, in order\n"
    OPTIONS_HELP
    "\n"
    "Sizes take K, M, G, T. SIGUSR1 prints the counters. See bight-serve(1).\n";
// clang-format on

static int serve_check_names(const struct options *options, struct err *err)
{
    for (unsigned i = 0; i < options->nr_images; i++) {
        // "Conventions" of the NBD protocol: clients may take a LIST with anything else for rubbish.
        if (!util_is_utf8(options_name(options, i)))
            return err_usage(err, "%s: its export name is not UTF-8; give it another by --name",
                             options->images[i]);
        for (unsigned j = 0; j < i; j++) {
            if (!strcmp(options_name(options, i), options_name(options, j)))
                return err_usage(err, "%s: two exports would be called %s; use --name for each",
                                 options->images[i], options_name(options, i));
        }
    }
    return 0;
}

static int serve_ready(struct worker *worker, struct err *err)
{
    (void)worker;
    (void)err;
    notify_send("READY=1");
    return 0;
}

static void serve_stopping(struct worker *worker)
{
    (void)worker;
    notify_send("STOPPING=1");
}

static int serve_run(struct options *options, struct err *err)
{
    struct transport_holds holds;
    int ret;

    worker_block_signals();
    ret = options_hold(options, &holds, err);
    if (ret < 0)
        return ret;
    for (unsigned i = 0; i < options->nr_images; i++)
        options->names[i] = options_name(options, i);
    if (!holds.nr_holds)
        ret =
            err_usage(err, "no transport is named; use --nbd ADDR, --vhost-user PATH, --fuse PATH or --ublk");
    else
        ret = worker_run(&(struct worker_options){.device = options->device,
                                                  .names = options->names,
                                                  .images = options->images,
                                                  .nr_images = options->nr_images,
                                                  .ring_name = options->ring_name,
                                                  .nr_workers = options->nr_workers,
                                                  .max_connections = options->max_connections,
                                                  .poll_ns = options->poll_us * 1000ULL,
                                                  .holds = &holds,
                                                  .ready = serve_ready,
                                                  .stopping = serve_stopping},
                         err);
    transports_release(&holds);
    return ret;
}

static int serve_main(int argc, char **argv)
{
    struct err err = {.line = ""};
    struct options options;
    int status = CLI_OK, ret = options_parse(&options, OPTIONS_SERVE, argc, argv, &err);

    if (ret == 1) {
        fputs(serve_help, stdout);
        goto out;
    }
    if (!ret)
        ret = serve_check_names(&options, &err);
    if (!ret)
        ret = serve_run(&options, &err);
    if (ret < 0) {
        if (err.line[0])
            log_line("%s", err.line);
        status = err.is_usage ? CLI_USAGE : CLI_ERROR;
    }
out:
    options_free(&options);
    return status;
}

const struct cli_command cli_serve = {
    .name = "serve",
    .summary = "serve images over NBD, in the foreground",
    .help = serve_help,
    .run = serve_main,
};
