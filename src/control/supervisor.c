#include "control/supervisor.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "control/http.h"
#include "control/verbs.h"
#include "core/change.h"
#include "core/stats.h"
#include "io/io.h"
#include "ring/ring.h"
#include "transport/fuse/mount.h"
#include "util/notify.h"
#include "util/unix_socket.h"
#include "util/util.h"

// P4
#define MAX_VAIN_DEATHS 5
#define LONG_LIFE_SEC 60
#define MAX_DEATHS 100
#define DEATHS_SEC 60

// From a worker to its supervisor: one datagram each.
struct message {
    enum {
        MESSAGE_IMAGE,    // this image is in use, with these settings; its descriptor comes with it
        MESSAGE_READY,    // it serves; text is the device, if it is another than before
        MESSAGE_STOPPING, // because it was asked to
        MESSAGE_ERROR,    // why it ends
    } kind;
    bool is_read_only, is_usage;
    char text[4096]; // the image's path; the device; what is wrong
    char io[512], map[64];
    uint64_t writeback_bytes;
};

struct supervisor {
    const struct supervisor_options *options;
    struct worker_options worker; // as the last worker has left it
    struct control_facts facts;
    int listen_fd; // control socket
    int signal_fd;
    // The worker.
    pid_t pid;      // 0: there is none
    int channel_fd; // messages come from there
    int guard_fd;   // P3: at its end when the last ring has gone; -1
    bool is_stopping, is_ready, is_over;
    int answer_fd;
    int ret;
    struct err err; // what it has said last
    int image_fd;   // P2; -1
    struct message image;
    // P4.
    struct queue_stats *stats; // the workers' counters, in memory that outlives them
    size_t stats_bytes;
    uint64_t started_ns, nr_served; // when the worker was started, and what had been served before
    unsigned nr_vain_deaths;
    uint64_t deaths_ns[MAX_DEATHS]; // the latest
};

// ---- In the worker

struct attached {
    struct supervisor *supervisor;
    struct control control;
    struct http *http;
    int channel_fd;
    int node_fd; // N2 of node.h
};

static void send_message(int channel_fd, const struct message *message, int fd)
{
    struct iovec iov = {.iov_base = (void *)message, .iov_len = sizeof(*message)};
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {
        .head = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))}};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
        msg.msg_control = &control;
        msg.msg_controllen = sizeof(control);
    }
    while (sendmsg(channel_fd, &msg, MSG_NOSIGNAL) < 0 && errno == EINTR)
        ; // P5: nobody listens: so be it
}

static void send_image(const struct attached *attached, const struct device *dev)
{
    struct message message = {
        .kind = MESSAGE_IMAGE,
        .is_read_only = dev->image->is_read_only,
        .writeback_bytes = dev->options.writeback_bytes,
    };

    snprintf(message.text, sizeof(message.text), "%s", dev->image->path);
    snprintf(message.io, sizeof(message.io), "%s", dev->options.io);
    snprintf(message.map, sizeof(message.map), "%s", dev->options.map);
    send_message(attached->channel_fd, &message, dev->image->fd);
}

static void worker_committed(struct device_change *change)
{
    struct worker *worker = change->arg;

    send_image(worker->options->arg, change->dev);
}

static void worker_asked_to_stop(struct control *control)
{
    worker_stop(control->worker);
}

// Now it can be used: by the node, or, where there is none to be had, without.
static void worker_has_node(void *arg, int error, const struct err *err)
{
    struct attached *attached = arg;
    struct message message = {.kind = MESSAGE_READY};

    if (error < 0)
        log_line("%s", err->line);
    if (attached->control.node.device[0]) {
        snprintf(message.text, sizeof(message.text), "%s", attached->control.node.device);
        snprintf(attached->supervisor->facts.device, CONTROL_DEVICE_BYTES, "%s",
                 attached->control.node.device);
    }
    control_start(&attached->control);
    send_message(attached->channel_fd, &message, -1);
}

static int worker_ready(struct worker *worker, struct err *err)
{
    struct attached *attached = worker->options->arg;
    const struct supervisor_options *options = attached->supervisor->options;
    int ret;

    attached->control = (struct control){
        .server = {.ring = worker->ring,
                   .fd = attached->supervisor->listen_fd,
                   .nr_pending = &worker->nr_pending},
        .state = CONTROL_RUNS,
        .facts = &attached->supervisor->facts,
        .worker = worker,
        .stop = worker_asked_to_stop,
    };
    if (options->metrics_fd >= 0) {
        ret = http_start(&attached->http, options->metrics_fd, worker->ring, worker->devs[0], err);
        if (ret < 0)
            return ret;
    }
    send_image(attached, worker->devs[0]);
    attached->control.node = (struct node){
        .ring = worker->ring,
        .nr_pending = &worker->nr_pending,
        .path = options->node_path,
        .options = {.is_read_only = worker->devs[0]->image->is_read_only,
                    .is_partscan = options->is_partscan,
                    .block_bytes = worker->devs[0]->options.block_bytes},
        .process_fd = attached->node_fd,
        .lock = PTHREAD_MUTEX_INITIALIZER,
    };
    // The worker before this one has put it there.
    if (options->node_path && !strncmp(attached->supervisor->facts.device, "/dev/loop", 9))
        snprintf(attached->control.node.device, LOOP_DEVICE_BYTES, "%.31s",
                 attached->supervisor->facts.device);
    else if (options->node_path) {
        node_do(&attached->control.node, NODE_ATTACH, worker_has_node, attached);
        return 0;
    }
    worker_has_node(attached, 0, NULL);
    return 0;
}

static void worker_has_let_go(void *arg, int error, const struct err *err)
{
    if (error < 0)
        log_line("%s", err->line);
    worker_go_on_stopping(arg);
}

// The kernel flushes the node while we still serve what is below it.
static bool worker_before_stop(struct worker *worker)
{
    struct attached *attached = worker->options->arg;

    if (!attached->control.node.device[0])
        return false;
    node_do(&attached->control.node, NODE_DETACH_LAZY, worker_has_let_go, worker);
    return true;
}

static void worker_stopping(struct worker *worker)
{
    struct attached *attached = worker->options->arg;

    send_message(attached->channel_fd, &(struct message){.kind = MESSAGE_STOPPING}, -1);
    if (attached->control.facts)
        control_stop(&attached->control);
    if (attached->http)
        http_stop(attached->http);
}

static void worker_stopped(struct worker *worker, int error, const struct err *err)
{
    struct attached *attached = worker->options->arg;
    struct supervisor *supervisor = attached->supervisor;

    if (attached->http)
        http_destroy(attached->http);
    control_end(&attached->control, error, err);
    if (getppid() == supervisor->facts.supervisor_pid)
        return;
    if (attached->node_fd >= 0)
        close(attached->node_fd);
    transports_release(supervisor->options->holds); // P5
    state_remove(supervisor->options->dir);
}

static int worker_main(struct supervisor *supervisor, int channel_fd, int guard_fd)
{
    struct attached attached = {.supervisor = supervisor, .channel_fd = channel_fd, .node_fd = -1};
    const struct supervisor_options *options = supervisor->options;
    struct message message = {.kind = MESSAGE_ERROR};
    struct err err = {.line = ""};
    int ret;

    close(supervisor->signal_fd);
    if (supervisor->answer_fd >= 0)
        close(supervisor->answer_fd);
    if (options->node_path) // of the only hold
        attached.node_fd =
            node_start_process(options->node_path, (int)options->holds->holds[0].facts[FUSE_FACT_PIPE]);
    ring_guard_fd = guard_fd;
    // A block device or a file of this machine may be what our memory is written back to.
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    supervisor->worker.arg = &attached;
    supervisor->worker.device.image.is_open = supervisor->image_fd >= 0;
    supervisor->worker.device.image.fd = supervisor->image_fd;
    ret = worker_run(&supervisor->worker, &err);
    if (ret < 0) {
        snprintf(message.text, sizeof(message.text), "%s",
                 err.line[0] ? err.line : "what was written last may be lost");
        message.is_usage = err.is_usage;
        send_message(channel_fd, &message, -1);
    }
    return ret < 0;
}

// ---- In the supervisor

void supervisor_tell(int fd, char kind, const char *text)
{
    if (fd >= 0)
        dprintf(fd, "%c%s\n", kind, text);
    else if (kind == '+')
        dprintf(STDOUT_FILENO, "%s\n", text);
    else
        log_line("%s", text);
}

static void supervisor_answer(struct supervisor *supervisor, const char *text)
{
    supervisor_tell(supervisor->answer_fd, '+', text);
    if (supervisor->answer_fd >= 0)
        close(supervisor->answer_fd);
    supervisor->answer_fd = -1;
}

// Requests that were served without an error, by all workers.
static uint64_t supervisor_served(const struct supervisor *supervisor)
{
    uint64_t nr = 0;

    for (unsigned i = 0; i < supervisor->worker.device.nr_queues; i++) {
        for (unsigned op = 0; op < REQ_OP_NR; op++)
            nr += atomic_load(&supervisor->stats[i].op[op].nr_done) -
                  atomic_load(&supervisor->stats[i].op[op].nr_errors);
    }
    return nr;
}

static int supervisor_share_stats(struct supervisor *supervisor)
{
    struct queue_stats *stats;

    supervisor->stats_bytes = supervisor->worker.device.nr_queues * sizeof(*stats);
    stats = mmap(NULL, supervisor->stats_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (stats == MAP_FAILED)
        return err_set(&supervisor->err, -errno, "memory for counters: %s", strerror(errno));
    supervisor->worker.device.stats = supervisor->stats = stats;
    return 0;
}

static int supervisor_start_worker(struct supervisor *supervisor)
{
    int channel[2], guard[2], ret;

    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) < 0)
        return err_set(&supervisor->err, -errno, "socketpair: %s", strerror(errno));
    if (pipe2(guard, O_CLOEXEC) < 0) {
        ret = err_set(&supervisor->err, -errno, "pipe: %s", strerror(errno));
        goto out_channel;
    }
    supervisor->pid = fork(); // P1
    if (supervisor->pid < 0) {
        ret = err_set(&supervisor->err, -errno, "fork: %s", strerror(errno));
        goto out_guard;
    }
    if (!supervisor->pid) {
        close(channel[0]);
        close(guard[0]);
        exit(worker_main(supervisor, channel[1], guard[1]));
    }
    close(channel[1]);
    close(guard[1]);
    supervisor->channel_fd = channel[0];
    supervisor->guard_fd = guard[0];
    supervisor->started_ns = util_now_ns();
    supervisor->nr_served = supervisor_served(supervisor);
    return 0;

out_guard:
    close(guard[0]);
    close(guard[1]);
out_channel:
    close(channel[0]);
    close(channel[1]);
    supervisor->pid = 0;
    return ret;
}

static void supervisor_write_state(struct supervisor *supervisor)
{
    struct json_object *object;
    int ret;

    supervisor->facts.worker_pid = supervisor->pid;
    object = control_describe(&supervisor->facts, "running", NULL);
    ret = state_write(supervisor->options->dir, "state",
                      json_object_to_json_string_ext(object, JSON_C_TO_STRING_PLAIN));
    if (ret < 0)
        log_line("%s: writing its state: %s", supervisor->options->dir->path, strerror(-ret));
    json_object_put(object);
}

static void supervisor_ready(struct supervisor *supervisor, const struct message *message)
{
    struct json_object *object;
    char *json;

    if (message->text[0])
        snprintf(supervisor->facts.device, sizeof(supervisor->facts.device), "%.500s", message->text);
    supervisor_write_state(supervisor);
    if (supervisor->is_ready)
        return;
    supervisor->is_ready = true;
    notify_send("READY=1");
    object = control_describe(&supervisor->facts, "running", NULL);
    json = supervisor->options->is_json ? server_text(object, JSON_C_TO_STRING_PLAIN) : NULL;
    supervisor_answer(supervisor, json ? json : supervisor->facts.device);
    free(json);
    json_object_put(object);
}

// What the next worker begins with.
static void supervisor_take_image(struct supervisor *supervisor, const struct message *message, int fd)
{
    if (supervisor->image_fd >= 0)
        close(supervisor->image_fd);
    supervisor->image_fd = fd;
    supervisor->image = *message;
    ((const char **)supervisor->worker.images)[0] = supervisor->image.text;
    supervisor->worker.device.io = supervisor->image.io;
    supervisor->worker.device.map = supervisor->image.map;
    supervisor->worker.device.writeback_bytes = message->writeback_bytes;
    supervisor->worker.device.image.is_read_only = message->is_read_only;
    supervisor->facts.image = supervisor->image.text;
    if (supervisor->is_ready)
        supervisor_write_state(supervisor);
}

// false: there is none now.
static bool supervisor_receive(struct supervisor *supervisor)
{
    struct message message = {.kind = MESSAGE_ERROR};
    struct iovec iov = {.iov_base = &message, .iov_len = sizeof(message)};
    union {
        struct cmsghdr head;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr msg = {.msg_iov = &iov,
                         .msg_iovlen = 1,
                         .msg_control = &control,
                         .msg_controllen = sizeof(control)};
    int fd = -1;

    if (supervisor->channel_fd < 0 ||
        recvmsg(supervisor->channel_fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != sizeof(message))
        return false;
    if (msg.msg_controllen && CMSG_FIRSTHDR(&msg))
        memcpy(&fd, CMSG_DATA(&control.head), sizeof(fd));
    switch (message.kind) {
    case MESSAGE_IMAGE:
        supervisor_take_image(supervisor, &message, fd);
        break;
    case MESSAGE_READY:
        supervisor_ready(supervisor, &message);
        break;
    case MESSAGE_STOPPING:
        supervisor->is_stopping = true;
        notify_send("STOPPING=1");
        break;
    case MESSAGE_ERROR:
        snprintf(supervisor->err.line, sizeof(supervisor->err.line), "%.500s", message.text);
        supervisor->err.is_usage = message.is_usage;
        break;
    }
    return true;
}

static void supervisor_give_up(struct supervisor *supervisor, const char *why)
{
    char reason[sizeof(supervisor->facts.reason)]; // why may be the one before

    snprintf(reason, sizeof(reason), "%s", why);
    memcpy(supervisor->facts.reason, reason, sizeof(reason));
    log_line("%s: %s; given up: detach it, and attach it again", supervisor->options->dir->name, reason);
    transports_release(supervisor->options->holds); // P4
    if (supervisor->image_fd >= 0)
        close(supervisor->image_fd);
    supervisor->image_fd = -1;
    supervisor_write_state(supervisor);
}

static void gave_up_stop(struct control *control)
{
    control_stop(control);
}

// Answers "show" and "detach". A ring of its own: nothing is forked any more.
static void supervisor_serve_given_up(struct supervisor *supervisor)
{
    unsigned nr_pending = 0;
    struct control control = {
        .server = {.fd = supervisor->listen_fd, .nr_pending = &nr_pending},
        .state = CONTROL_GAVE_UP,
        .facts = &supervisor->facts,
        .stop = gave_up_stop,
    };
    struct err err = {.line = ""};
    sigset_t set;

    if (ring_create(&ring_threads_ops, &control.server.ring, &err) < 0)
        return;
    sigemptyset(&set); // a signal ends it here as well
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    control_start(&control);
    while (control.state == CONTROL_GAVE_UP || nr_pending) {
        if (ring_run(control.server.ring) < 0)
            break;
    }
    ring_destroy(control.server.ring);
    control_end(&control, 0, &err);
}

static void describe_death(char *text, size_t bytes, int status)
{
    if (WIFSIGNALED(status))
        snprintf(text, bytes, "the worker was killed by signal %d (SIG%s)", WTERMSIG(status),
                 sigabbrev_np(WTERMSIG(status)) ? sigabbrev_np(WTERMSIG(status)) : "?");
    else if (WEXITSTATUS(status))
        snprintf(text, bytes, "the worker ended with status %d", WEXITSTATUS(status));
    else // nothing is left to serve
        snprintf(text, bytes, "its file was unmounted, or its device deleted, by somebody else");
}

// P4: whether this death was the last one, and why.
static bool supervisor_is_hopeless(struct supervisor *supervisor, char *why, size_t why_bytes)
{
    uint64_t now_ns = util_now_ns();

    if (supervisor_served(supervisor) > supervisor->nr_served ||
        now_ns - supervisor->started_ns >= LONG_LIFE_SEC * NSEC_PER_SEC)
        supervisor->nr_vain_deaths = 0;
    else
        supervisor->nr_vain_deaths++;
    memmove(supervisor->deaths_ns, supervisor->deaths_ns + 1,
            sizeof(supervisor->deaths_ns) - sizeof(uint64_t));
    supervisor->deaths_ns[MAX_DEATHS - 1] = now_ns;
    if (supervisor->nr_vain_deaths == MAX_VAIN_DEATHS)
        snprintf(why, why_bytes, "%.200s, the %dth time in a row before it had served anything",
                 supervisor->facts.reason, MAX_VAIN_DEATHS);
    else if (supervisor->deaths_ns[0] && now_ns - supervisor->deaths_ns[0] < DEATHS_SEC * NSEC_PER_SEC)
        snprintf(why, why_bytes, "%.200s, the %dth time in %d seconds", supervisor->facts.reason, MAX_DEATHS,
                 DEATHS_SEC);
    else
        return false;
    return true;
}

// The worker is dead, and so are its rings (P3).
static void supervisor_replace_worker(struct supervisor *supervisor)
{
    char why[320];

    close(supervisor->guard_fd);
    supervisor->guard_fd = -1;
    if (supervisor_is_hopeless(supervisor, why, sizeof(why))) {
        supervisor_give_up(supervisor, why);
    } else {
        supervisor->facts.nr_restarts++;
        if (supervisor_start_worker(supervisor) == 0)
            return;
        supervisor_give_up(supervisor, supervisor->err.line);
    }
    supervisor_serve_given_up(supervisor);
    supervisor->ret = -EIO;
    supervisor->is_over = true;
}

static void supervisor_bury(struct supervisor *supervisor)
{
    int status;

    if (!supervisor->pid || waitpid(supervisor->pid, &status, WNOHANG) != supervisor->pid)
        return;
    while (supervisor_receive(supervisor))
        ; // its last words
    close(supervisor->channel_fd);
    supervisor->channel_fd = -1;
    supervisor->pid = 0;
    describe_death(supervisor->facts.reason, sizeof(supervisor->facts.reason), status);
    if (supervisor->is_stopping || !supervisor->is_ready) {
        bool is_clean = WIFEXITED(status) && !WEXITSTATUS(status);

        supervisor->is_over = true;
        supervisor->ret = is_clean ? 0 : -EIO;
        if (is_clean)
            return;
        if (!supervisor->err.line[0])
            err_set(&supervisor->err, -EIO, "%s: %s", supervisor->options->dir->name,
                    supervisor->facts.reason);
    } else if (WIFEXITED(status)) { // it knows why it cannot go on
        supervisor_give_up(supervisor,
                           supervisor->err.line[0] ? supervisor->err.line : supervisor->facts.reason);
        supervisor_serve_given_up(supervisor);
        supervisor->ret = -EIO;
        supervisor->is_over = true;
    } else {
        log_line("%s: %s; another one starts", supervisor->options->dir->name, supervisor->facts.reason);
    }
}

static void supervisor_signalled(struct supervisor *supervisor)
{
    struct signalfd_siginfo info;

    while (read(supervisor->signal_fd, &info, sizeof(info)) == sizeof(info)) {
        if (info.ssi_signo == SIGCHLD)
            supervisor_bury(supervisor);
        else if (supervisor->pid) // SIGQUIT: by force, for one that hangs
            kill(supervisor->pid, info.ssi_signo == SIGQUIT ? SIGKILL : (int)info.ssi_signo);
        if (info.ssi_signo != SIGCHLD && info.ssi_signo != SIGUSR1)
            supervisor->is_stopping = true; // also when the worker is dead at this moment
    }
}

static void supervisor_loop(struct supervisor *supervisor)
{
    while (!supervisor->is_over) {
        bool waits_for_rings = !supervisor->pid; // P3
        struct pollfd fds[] = {
            {.fd = supervisor->signal_fd, .events = POLLIN},
            {.fd = supervisor->channel_fd, .events = POLLIN},
            {.fd = waits_for_rings ? supervisor->guard_fd : -1, .events = 0},
        };

        if (poll(fds, ARRAY_SIZE(fds), -1) < 0)
            continue;
        if (fds[1].revents & POLLIN)
            supervisor_receive(supervisor);
        else if (fds[1].revents) { // its end: SIGCHLD will follow
            close(supervisor->channel_fd);
            supervisor->channel_fd = -1;
        }
        if (fds[0].revents)
            supervisor_signalled(supervisor);
        if (supervisor->is_over || !waits_for_rings || !fds[2].revents)
            continue;
        if (supervisor->is_stopping)
            supervisor->is_over = true;
        else
            supervisor_replace_worker(supervisor);
    }
}

static int supervisor_catch_signals(struct supervisor *supervisor)
{
    sigset_t set;

    worker_block_signals();
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGQUIT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGUSR1);
    supervisor->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    return supervisor->signal_fd < 0 ? err_set(&supervisor->err, -errno, "signalfd: %s", strerror(errno)) : 0;
}

static int supervisor_listen(struct supervisor *supervisor)
{
    char path[STATE_PATH_MAX];

    // By way of the directory's descriptor: a path in it may be too long for a socket.
    snprintf(path, sizeof(path), "/proc/self/fd/%d/control", supervisor->options->dir->fd);
    supervisor->listen_fd = unix_socket_listen("control socket: ", path, &supervisor->err);
    if (supervisor->listen_fd < 0)
        return err_set(&supervisor->err, supervisor->listen_fd,
                       "%s/control: %s; make room, or set BIGHT_RUN_DIR", supervisor->options->dir->path,
                       strerror(-supervisor->listen_fd));
    return 0;
}

int supervisor_run(const struct supervisor_options *options, struct err *err)
{
    struct supervisor supervisor = {
        .options = options,
        .worker = options->worker,
        .facts = {.dir = options->dir,
                  .image = options->worker.images[0],
                  .holds = options->holds,
                  .supervisor_pid = getpid(),
                  .attached_at = time(NULL)},
        .channel_fd = -1,
        .guard_fd = -1,
        .image_fd = -1,
        .answer_fd = options->answer_fd,
        .err = {.line = ""},
    };
    char title[16];
    int ret;

    snprintf(title, sizeof(title), "bight:%.9s", options->dir->name);
    prctl(PR_SET_NAME, title);
    supervisor.worker.holds = options->holds;
    supervisor.worker.ready = worker_ready;
    supervisor.worker.before_stop = worker_before_stop;
    supervisor.worker.stopping = worker_stopping;
    supervisor.worker.stopped = worker_stopped;
    supervisor.worker.committed = worker_committed;
    transport_hold_uri(&options->holds->holds[0], supervisor.facts.device, sizeof(supervisor.facts.device));
    ret = supervisor_share_stats(&supervisor);
    if (!ret)
        ret = supervisor_catch_signals(&supervisor);
    if (!ret)
        ret = supervisor_listen(&supervisor);
    if (!ret) {
        supervisor_write_state(&supervisor); // now: what is held is to be found should all be killed at once
        ret = supervisor_start_worker(&supervisor);
    }
    if (ret < 0) {
        transports_release(options->holds);
        *err = supervisor.err;
        return ret;
    }
    supervisor_loop(&supervisor);
    transports_release(options->holds);
    munmap(supervisor.stats, supervisor.stats_bytes);
    if (!supervisor.is_ready)
        *err = supervisor.err;
    else if (supervisor.ret < 0 && supervisor.err.line[0])
        log_line("%s", supervisor.err.line);
    return supervisor.ret;
}
