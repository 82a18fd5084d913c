// bight attach: a supervisor and its worker in the background, and a device for who asked.

#include <errno.h>
#include <fcntl.h>
#include <json-c/json.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/cli.h"
#include "cli/options.h"
#include "control/clean.h"
#include "control/http.h"
#include "control/supervisor.h"
#include "util/log.h"
#include "util/notify.h"

// clang-format off
static const char attach_help[] =
    "usage: bight attach [OPTIONS] IMAGE [TRANSPORT...]\n"
    "\n"
    "Attaches IMAGE (a raw file or a block device), prints the device or the URI, and returns. It stays\n"
    "until bight detach. A worker process that is killed is replaced at once.\n"
    "\n"
    "  --name NAME          of the device (default: the file's, without its ending; NAME-2... when taken)\n"
    "  --json               print name, pid, device and URIs, for programs\n"
    "  --metrics ADDR       counters for Prometheus by HTTP on HOST:PORT or unix:PATH\n"
    "  --partscan           block devices for its partitions as well, /dev/loopNpM\n"
    "  --foreground         do not go to the background; for systemd and its like\n"
    OPTIONS_HELP
    "\n"
    "Sizes take K, M, G, T. See bight-attach(1).\n";
// clang-format on

struct attach {
    char **argv;
    int argc;
    struct options options;
    char image[PATH_MAX], cwd[PATH_MAX];
    struct state state;
    struct transport_holds holds;
    int metrics_fd;
    const char *node_path; // of the FUSE file to put a loop device on
    char **texts;          // that were made, to be freed
    unsigned nr_texts;
};

// "BASE/NAME", or NULL: no memory. It lives as long as attach.
static const char *attach_path(struct attach *attach, const char *prefix, const char *base, const char *name)
{
    char **texts = realloc(attach->texts, (attach->nr_texts + 1) * sizeof(*texts)), *text;

    if (!texts)
        return NULL;
    attach->texts = texts;
    if (asprintf(&text, "%s%s/%s", prefix, base, name) < 0)
        return NULL;
    return texts[attach->nr_texts++] = text;
}

// The background process may outlive the directory it was started in, and must not depend on it.
static const char *absolute_addr(struct attach *attach, const char *addr)
{
    bool is_unix = !strncmp(addr, "unix:", 5);
    const char *path = is_unix ? addr + 5 : addr, *absolute;

    if (path[0] == '/')
        return addr;
    absolute = attach_path(attach, is_unix ? "unix:" : "", attach->cwd, path);
    return absolute ? absolute : addr;
}

static int attach_resolve(struct attach *attach, struct err *err)
{
    struct options *options = &attach->options;

    if (options->nr_images != 1)
        return err_usage(err, "attach: one IMAGE at a time; bight serve takes several");
    if (options->nr_names && !state_is_name(options->names[0]))
        return err_usage(err,
                         "--name: %s: use up to %d of A-Z a-z 0-9 . _ -, and begin with a letter or digit",
                         options->names[0], STATE_NAME_MAX);
    if (!realpath(options->images[0], attach->image))
        return err_set(err, -errno, "%s: %s; %s", options->images[0], strerror(errno),
                       errno == ENOENT ? "create it first (truncate -s SIZE makes a sparse one)"
                                       : "name a file that you can reach");
    options->images[0] = attach->image;
    if (!getcwd(attach->cwd, sizeof(attach->cwd)))
        strcpy(attach->cwd, "/");
    for (unsigned i = 0; i < TRANSPORT_NR; i++) {
        bool is_path =
            transport_table[i] == &fuse_transport_ops || transport_table[i] == &vhost_user_transport_ops;

        for (unsigned j = 0; j < options->addrs[i].nr_addrs; j++) {
            const char **addr = &options->addrs[i].addrs[j];

            if (is_path || !strncmp(*addr, "unix:", 5))
                *addr = absolute_addr(attach, *addr);
        }
    }
    if (options->metrics && !strncmp(options->metrics, "unix:", 5))
        options->metrics = absolute_addr(attach, options->metrics);
    return 0;
}

static int attach_claim(struct attach *attach, struct err *err)
{
    bool is_exact = attach->options.nr_names;
    char name[STATE_NAME_MAX + 1];
    struct state dead = {.fd = -1};
    int ret;

    if (is_exact)
        snprintf(name, sizeof(name), "%s", attach->options.names[0]);
    else
        state_name_of(attach->image, name);
    ret = state_claim(&attach->state, name, is_exact, err);
    if (ret != -EEXIST || state_open(&dead, name, &(struct err){.line = ""}) < 0)
        return ret;
    if (state_take_dead(&dead)) { // what asks for a name by a unit file asks again after a crash
        clean_dead(&dead, err);
        ret = state_claim(&attach->state, name, is_exact, err);
    }
    state_close(&dead);
    return ret;
}

static int attach_hold_one(struct attach *attach, const struct transport_ops *ops, const char *addr,
                           struct err *err)
{
    struct options *options = &attach->options;
    struct transport_addrs *addrs = options_addrs_of(options, ops);
    int ret;

    addrs->addrs[addrs->nr_addrs++] = addr;
    ret = options_hold(options, &attach->holds, err);
    if (ret < 0)
        addrs->nr_addrs--;
    return ret;
}

// None was named: the best that can be had. A block device, for root; a file; NBD in the run directory.
static int attach_choose(struct attach *attach, struct err *err)
{
    bool is_root = !geteuid();
    const char *file = attach_path(attach, "", attach->state.path, "data");
    const char *nbd = attach_path(attach, "unix:", attach->state.path, "nbd");
    int ret;

    if (!file || !nbd)
        return err_set(err, -ENOMEM, "out of memory");
    if (is_root && !attach->options.device.is_passthrough && !access("/dev/ublk-control", R_OK | W_OK)) {
        ret = attach_hold_one(attach, &ublk_transport_ops, "", err);
        if (!ret)
            return 0;
        log_verbose("%s; trying FUSE", err->line);
    }
    if (!access("/dev/fuse", R_OK | W_OK)) {
        ret = attach_hold_one(attach, &fuse_transport_ops, file, err);
        if (!ret && is_root && !access("/dev/loop-control", R_OK | W_OK))
            attach->node_path = file;
        if (!ret || attach->options.device.is_passthrough)
            return ret;
        log_verbose("%s; trying NBD", err->line);
    }
    return attach_hold_one(attach, &nbd_transport_ops, nbd, err);
}

static bool attach_has_transport(const struct options *options)
{
    for (unsigned i = 0; i < TRANSPORT_NR; i++) {
        if (options->addrs[i].nr_addrs)
            return true;
    }
    return notify_nr_fds(options->is_foreground ? getpid() : getppid()); // who was asked
}

// Its driver has the kernel look for partitions, whatever is asked.
static bool attach_has_ublk(const struct attach *attach)
{
    for (unsigned i = 0; i < attach->holds.nr_holds; i++) {
        if (attach->holds.holds[i].ops == &ublk_transport_ops)
            return true;
    }
    return false;
}

static int attach_hold(struct attach *attach, struct err *err)
{
    int ret;

    attach->metrics_fd = -1;
    if (attach_has_transport(&attach->options))
        ret = options_hold(&attach->options, &attach->holds, err);
    else
        ret = attach_choose(attach, err);
    if (ret < 0)
        return ret;
    if (!attach->holds.nr_holds)
        ret = err_usage(err, "attach: no transport; use --nbd, or none for the default");
    else if (attach->options.is_partscan && !attach->node_path && !attach_has_ublk(attach))
        ret = err_usage(err, "--partscan: is for the block device of a plain attach by root; leave it out");
    else if (attach->options.metrics)
        ret = attach->metrics_fd = http_listen(attach->options.metrics, err);
    if (ret < 0)
        transports_release(&attach->holds);
    return ret;
}

// For bight recover, and what makes the directory a device's (Y3).
static int attach_remember(const struct attach *attach, struct err *err)
{
    struct json_object *object = json_object_new_object(), *argv = json_object_new_array();
    int ret;

    for (int i = 0; i < attach->argc; i++)
        json_object_array_add(argv, json_object_new_string(attach->argv[i]));
    json_object_object_add(object, "cwd", json_object_new_string(attach->cwd));
    json_object_object_add(object, "argv", argv);
    ret = state_write(&attach->state, "command", json_object_to_json_string(object));
    if (ret < 0)
        err_set(err, ret, "%s: writing there: %s; make room, or set BIGHT_RUN_DIR", attach->state.path,
                strerror(-ret));
    json_object_put(object);
    return ret;
}

// Everything from the name on, in the process that stays. answer_fd: see supervisor.h; -1: stdout and stderr
// are those of who asked.
static int attach_run(struct attach *attach, int answer_fd)
{
    const struct options *options = &attach->options;
    const char *names[1] = {attach->state.name};
    struct err err = {.line = ""};
    int ret;

    worker_block_signals();
    ret = attach_claim(attach, &err);
    if (ret < 0)
        goto out;
    ret = attach_remember(attach, &err);
    if (!ret)
        ret = attach_hold(attach, &err);
    if (ret < 0) {
        state_remove(&attach->state);
        goto out;
    }
    if (!options->is_foreground) {
        int log_fd = openat(attach->state.fd, "log", O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);

        dup2(log_fd, STDERR_FILENO);
        close(log_fd);
        if (chdir("/") < 0)
            log_verbose("chdir: %s", strerror(errno));
    }
    ret = supervisor_run(
        &(struct supervisor_options){
            .worker = {.device = options->device,
                       .names = names,
                       .images = options->images,
                       .nr_images = 1,
                       .ring_name = options->ring_name,
                       .nr_workers = options->nr_workers,
                       .max_connections = options->max_connections,
                       .poll_ns = options->poll_us * 1000ULL},
            .holds = &attach->holds,
            .dir = &attach->state,
            .answer_fd = answer_fd,
            .is_json = options->is_json,
            .metrics_fd = attach->metrics_fd,
            .node_path = attach->node_path,
            .is_partscan = options->is_partscan,
        },
        &err);
    state_remove(&attach->state);
    if (!ret)
        return CLI_OK;
out:
    if (!err.line[0])
        return CLI_ERROR;
    supervisor_tell(answer_fd, err.is_usage ? '?' : '-', err.line);
    return err.is_usage ? CLI_USAGE : CLI_ERROR;
}

// The answer of the process that stays.
static int attach_wait(int fd)
{
    char *line = NULL;
    size_t bytes = 0;
    FILE *file = fdopen(fd, "r");
    ssize_t len = file ? getline(&line, &bytes, file) : -1;
    int status = CLI_ERROR;

    if (len < 2) {
        log_line("attach: its process has died; see the kernel's log");
    } else {
        line[len - 1] = '\0';
        status = line[0] == '+' ? CLI_OK : line[0] == '?' ? CLI_USAGE : CLI_ERROR;
        if (status == CLI_OK)
            puts(line + 1);
        else
            log_line("%s", line + 1);
    }
    free(line);
    if (file)
        fclose(file);
    return status;
}

static int attach_background(struct attach *attach)
{
    int answer[2], null_fd;
    pid_t pid;

    if (pipe2(answer, O_CLOEXEC) < 0 || (pid = fork()) < 0) {
        log_line("attach: starting a process: %s", strerror(errno));
        return CLI_ERROR;
    }
    if (pid) {
        close(answer[1]);
        return attach_wait(answer[0]);
    }
    // Locks and pipes of who called are not ours to keep: a script may wait for the end of them.
    close_range(STDERR_FILENO + 1, (unsigned)answer[1] - 1, 0);
    close_range((unsigned)answer[1] + 1, ~0U, 0);
    setsid();
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    dup2(null_fd, STDIN_FILENO);
    dup2(null_fd, STDOUT_FILENO);
    close(null_fd);
    return attach_run(attach, answer[1]);
}

static int attach_main(int argc, char **argv)
{
    struct attach *attach = calloc(1, sizeof(*attach));
    struct err err = {.line = ""};
    int status = CLI_OK, ret;

    if (!attach) {
        log_line("out of memory");
        return CLI_ERROR;
    }
    attach->argv = argv;
    attach->argc = argc;
    ret = options_parse(&attach->options, OPTIONS_ATTACH, argc, argv, &err);
    if (ret == 1) {
        fputs(attach_help, stdout);
        goto out;
    }
    if (!ret)
        ret = attach_resolve(attach, &err);
    if (ret < 0) {
        log_line("%s", err.line);
        status = err.is_usage ? CLI_USAGE : CLI_ERROR;
        goto out;
    }
    status = attach->options.is_foreground ? attach_run(attach, -1) : attach_background(attach);
out:
    options_free(&attach->options);
    while (attach->nr_texts)
        free(attach->texts[--attach->nr_texts]);
    free(attach->texts);
    free(attach);
    return status;
}

const struct cli_command cli_attach = {
    .name = "attach",
    .summary = "attach an image as a device, in the background",
    .help = attach_help,
    .run = attach_main,
};
