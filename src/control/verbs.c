#include "control/verbs.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/metrics.h"
#include "control/worker.h"
#include "core/change.h"
#include "core/queue.h"
#include "io/io.h"
#include "map/map.h"
#include "util/util.h"
#include "writeback/writeback.h"

#define LAZY_NS (NSEC_PER_SEC / 10)

// ---- show, stats

static void add_string(struct json_object *object, const char *key, const char *text)
{
    json_object_object_add(object, key, json_object_new_string(text));
}

static void add_uint(struct json_object *object, const char *key, uint64_t n)
{
    json_object_object_add(object, key, json_object_new_uint64(n));
}

static struct json_object *transports_json(const struct transport_holds *holds)
{
    struct json_object *array = json_object_new_array();

    for (unsigned i = 0; i < holds->nr_holds; i++) {
        const struct transport_hold *hold = &holds->holds[i];
        struct json_object *object = json_object_new_object(), *facts = json_object_new_array();
        char uri[CONTROL_DEVICE_BYTES];

        transport_hold_uri(hold, uri, sizeof(uri));
        add_string(object, "transport", hold->ops->name);
        if (hold->addr)
            add_string(object, "address", hold->addr);
        add_string(object, "uri", uri);
        for (unsigned f = 0; f < ARRAY_SIZE(hold->facts); f++)
            json_object_array_add(facts, json_object_new_uint64(hold->facts[f]));
        json_object_object_add(object, "facts", facts);
        json_object_array_add(array, object);
    }
    return array;
}

static void describe_map(struct json_object *object, struct map *map)
{
    struct map_status status;

    if (!map_describe(map, &status))
        return;
    json_object_object_add(object, "redirects", json_object_new_boolean(status.is_redirecting));
    add_string(object, status.is_redirecting ? "redirects_to" : "redirects_not",
               status.is_redirecting ? status.device : status.why_not);
    add_uint(object, "redirected_bytes", status.device_bytes);
    add_uint(object, "redirected_extents", status.nr_extents);
    add_uint(object, "zero_bytes", status.zero_bytes);
    add_uint(object, "by_way_of_file_bytes", status.file_bytes);
    add_uint(object, "not_asked_for_bytes", status.unknown_bytes);
    add_uint(object, "lease_breaks", status.nr_lease_breaks);
}

static void describe_writeback(struct json_object *object, const struct device *dev)
{
    struct writeback_stats stats;

    if (!writeback_stats(dev, &stats))
        return;
    add_uint(object, "writeback_bytes", stats.size_bytes);
    add_uint(object, "writeback_used_bytes", stats.used_bytes);
    add_uint(object, "writeback_dirty_bytes", stats.dirty_bytes);
    add_uint(object, "writeback_delayed_bytes", stats.delayed_bytes);
    add_uint(object, "writeback_reserved_bytes", stats.reserved_bytes);
    add_uint(object, "writeback_failed_bytes", stats.failed_bytes);
    if (stats.error)
        add_string(object, "writeback_error", strerror(-stats.error));
    add_uint(object, "writeback_written_bytes", stats.written_bytes);
    add_uint(object, "writeback_bytes_per_second", stats.bytes_per_s);
    add_uint(object, "writeback_writes", stats.nr_writes);
    add_uint(object, "writeback_runs_allocated", stats.nr_runs);
    add_uint(object, "writeback_map_calls", stats.nr_map_calls);
    add_uint(object, "writeback_allocated_bytes", stats.allocated_bytes);
    add_uint(object, "writeback_throttled", stats.nr_throttled);
    add_uint(object, "writeback_passed", stats.nr_passed);
}

static void describe_device(struct json_object *object, const struct device *dev)
{
    const struct limits *limits = &dev->limits;

    add_string(object, "image", dev->image->path);
    add_uint(object, "size_bytes", limits->size_bytes);
    json_object_object_add(object, "read_only", json_object_new_boolean(dev->image->is_read_only));
    add_string(object, "io", dev->options.io);
    add_string(object, "io_in_use", dev->io->ops->name);
    add_string(object, "map", dev->options.map);
    json_object_object_add(object, "passthrough", json_object_new_boolean(dev->options.is_passthrough));
    describe_map(object, dev->map);
    describe_writeback(object, dev);
    add_string(object, "ring", dev->queues[0].ring->ops->name);
    add_uint(object, "queues", dev->nr_queues);
    add_uint(object, "depth", dev->depth);
    add_uint(object, "offset_bytes", dev->image->offset_bytes);
    add_uint(object, "min_block_bytes", limits->min_block_bytes);
    add_uint(object, "preferred_block_bytes", limits->preferred_block_bytes);
    json_object_object_add(object, "volatile_cache",
                           json_object_new_boolean(dev->durability.has_volatile_cache));
}

struct json_object *control_describe(const struct control_facts *facts, const char *state,
                                     const struct worker *worker)
{
    struct json_object *object = json_object_new_object();

    add_string(object, "name", facts->dir->name);
    add_string(object, "state", state);
    add_string(object, "device", facts->device);
    add_string(object, "image", facts->image);
    add_uint(object, "pid", (uint64_t)facts->supervisor_pid);
    add_uint(object, "attached_at", (uint64_t)facts->attached_at);
    add_uint(object, "restarts", facts->nr_restarts);
    if (facts->reason[0])
        add_string(object, "reason", facts->reason);
    json_object_object_add(object, "transports", transports_json(facts->holds));
    if (worker || facts->worker_pid)
        add_uint(object, "worker_pid", (uint64_t)(worker ? getpid() : facts->worker_pid));
    if (worker)
        describe_device(object, worker->devs[0]);
    return object;
}

static const char *control_state_name(const struct control *control)
{
    switch (control->state) {
    case CONTROL_STOPS:
        return "stopping";
    case CONTROL_GAVE_UP:
        return "failed";
    default:
        // The supervisor is our parent, and who takes its place is not.
        return getppid() != control->facts->supervisor_pid ? "unsupervised"
               : control->is_lazy                          ? "detaching"
                                                           : "running";
    }
}

static void verb_show(struct control *control, struct server_conn *conn, struct json_object *request)
{
    (void)request;
    server_reply(conn, control_describe(control->facts, control_state_name(control), control->worker), NULL);
}

static bool asks_for(struct json_object *request, const char *flag)
{
    struct json_object *wanted;

    return json_object_object_get_ex(request, flag, &wanted) && json_object_get_boolean(wanted);
}

static void verb_stats(struct control *control, struct server_conn *conn, struct json_object *request)
{
    struct json_object *result = metrics_json(control->worker->devs[0], asks_for(request, "buckets"));
    struct err err;
    char *text;

    if (!result) {
        err_set(&err, -ENOMEM, "out of memory");
        err.is_usage = false;
        server_reply(conn, NULL, &err);
        return;
    }
    if (asks_for(request, "openmetrics")) {
        text = metrics_text(control->worker->devs[0]);
        add_string(result, "openmetrics", text ? text : "");
        free(text);
    }
    server_reply(conn, result, NULL);
}

// ---- set, switch, resize

struct verb_change {
    struct device_change change;
    struct control *control;
    struct server_conn *conn;
    enum node_op node_op;
};

static void verb_told(void *arg, int error, const struct err *err)
{
    struct verb_change *verb = arg;
    struct control *control = verb->control;

    server_reply(verb->conn,
                 error < 0 ? NULL
                           : control_describe(control->facts, control_state_name(control), control->worker),
                 err);
    free(verb);
}

static void verb_changed(struct device_change *change, int error)
{
    struct verb_change *verb = container_of(change, struct verb_change, change);
    struct control *control = verb->control;
    bool is_read_only = change->dev->image->is_read_only;

    if (!error)
        error = transports_device_changed(&control->worker->transports, change->dev, &change->err);
    if (error < 0) {
        verb_told(verb, error, &change->err);
    } else if (verb->node_op == NODE_READ_ONLY && is_read_only == control->node.options.is_read_only) {
        verb_told(verb, 0, NULL);
    } else {
        control->node.options.is_read_only = is_read_only;
        node_do(&control->node, verb->node_op, verb_told, verb);
    }
}

static struct verb_change *verb_change(struct control *control, struct server_conn *conn)
{
    struct verb_change *verb = calloc(1, sizeof(*verb));
    struct err err = {.line = "out of memory"};

    if (!verb) {
        server_reply(conn, NULL, &err);
        return NULL;
    }
    verb->control = control;
    verb->conn = conn;
    device_change_init(&verb->change, control->worker->devs[0], control->server.ring, verb_changed);
    verb->change.committed = control->worker->options->committed;
    verb->change.arg = control->worker;
    return verb;
}

static void verb_change_refused(struct verb_change *verb)
{
    device_change_end(&verb->change);
    server_reply(verb->conn, NULL, &verb->change.err);
    free(verb);
}

static void verb_set(struct control *control, struct server_conn *conn, struct json_object *request)
{
    struct verb_change *verb = verb_change(control, conn);
    struct json_object *settings;
    unsigned nr = 0;

    if (!verb)
        return;
    verb->node_op = NODE_READ_ONLY;
    if (json_object_object_get_ex(request, "settings", &settings) &&
        json_object_is_type(settings, json_type_object)) {
        json_object_object_foreach(settings, key, value)
        {
            nr++;
            if (!json_object_is_type(value, json_type_string))
                err_usage(&verb->change.err, "set: %.100s: its value is no string", key);
            else if (device_change_set(&verb->change, key, json_object_get_string(value)) == 0)
                continue;
            verb_change_refused(verb);
            return;
        }
    }
    if (!nr) {
        err_usage(&verb->change.err, "set: nothing to set; use KEY=VALUE");
        verb_change_refused(verb);
        return;
    }
    device_change_start(&verb->change);
}

// Whether /dev/NAME or a partition of it is the block device, or is what the file's own file system is on.
static bool is_on_disk(const struct statx *image, const char *name)
{
    bool is_device = S_ISBLK(image->stx_mode);
    char path[64], disk[CONTROL_DEVICE_BYTES + 8], link[PATH_MAX];
    ssize_t len;
    const char *at;

    snprintf(path, sizeof(path), "/sys/dev/block/%u:%u",
             is_device ? image->stx_rdev_major : image->stx_dev_major,
             is_device ? image->stx_rdev_minor : image->stx_dev_minor);
    snprintf(disk, sizeof(disk), "/block/%s", name); // ".../block/loop0", ".../block/loop0/loop0p1"
    len = readlink(path, link, sizeof(link) - 1);
    link[max_of(len, 0)] = '\0';
    at = strstr(link, disk);
    return at && (at[strlen(disk)] == '/' || !at[strlen(disk)]);
}

// Whether an image is this device itself, or lies on it: it would be asked for what it asks for.
static bool verb_is_own(const struct control *control, const char *image)
{
    const struct control_facts *facts = control->facts;
    char uri[CONTROL_DEVICE_BYTES];
    struct statx theirs, ours;

    if (statx(AT_FDCWD, image, AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &theirs) < 0)
        return false; // who opens it tells
    for (unsigned i = 0; i <= facts->holds->nr_holds; i++) {
        if (i < facts->holds->nr_holds)
            transport_hold_uri(&facts->holds->holds[i], uri, sizeof(uri));
        else
            snprintf(uri, sizeof(uri), "%s", control->node.device);
        if (!strncmp(uri, "/dev/", 5) && is_on_disk(&theirs, uri + 5))
            return true;
        if (statx(AT_FDCWD, uri, AT_STATX_DONT_SYNC, STATX_BASIC_STATS, &ours) < 0)
            continue;
        if (S_ISREG(ours.stx_mode) && ours.stx_dev_major == theirs.stx_dev_major &&
            ours.stx_dev_minor == theirs.stx_dev_minor && ours.stx_ino == theirs.stx_ino)
            return true;
    }
    return false;
}

static void verb_switch(struct control *control, struct server_conn *conn, struct json_object *request)
{
    struct verb_change *verb = verb_change(control, conn);
    struct json_object *image;

    if (!verb)
        return;
    verb->node_op = NODE_REREAD;
    if (!json_object_object_get_ex(request, "image", &image) ||
        !json_object_is_type(image, json_type_string) || json_object_get_string(image)[0] != '/') {
        err_usage(&verb->change.err, "switch: no image is named; use its absolute path");
        verb_change_refused(verb);
    } else if (verb_is_own(control, json_object_get_string(image))) {
        err_set(&verb->change.err, -ELOOP, "%.400s: is this device, or lies on it; name another image",
                json_object_get_string(image));
        verb_change_refused(verb);
    } else if (device_change_image(&verb->change, json_object_get_string(image)) < 0) {
        verb_change_refused(verb);
    } else {
        device_change_start(&verb->change);
    }
}

static void verb_resize(struct control *control, struct server_conn *conn, struct json_object *request)
{
    struct verb_change *verb = verb_change(control, conn);

    (void)request;
    if (!verb)
        return;
    verb->node_op = NODE_RESIZE;
    device_change_start(&verb->change);
}

// ---- detach

struct verb_detach {
    struct control *control;
    struct server_conn *conn;
    bool is_lazy, is_forced;
    struct writeback_drain drain;
    struct ring_op op; // from the queue's thread to ours
    uint64_t lost_bytes;
};

static void control_detach(struct control *control, struct server_conn *conn)
{
    if (conn) {
        server_park(conn);
        control->detaching = conn;
    }
    control->stop(control);
}

static void lazy_look(struct ring_op *op, int res)
{
    struct control *control = container_of(op, struct control, lazy_op);
    const struct node *node = &control->node;
    struct err err;

    (void)res;
    if (control->state != CONTROL_RUNS)
        return;
    if (transports_busy(&control->worker->transports, &err) < 0 ||
        (node->device[0] && node_is_there(node->device, node->path))) {
        op->timeout_ns = LAZY_NS;
        ring_queue(control->server.ring, op);
    } else {
        control_detach(control, NULL);
    }
}

// The kernel lets go of the node at its last close; we do after that.
static void detach_begun_lazily(void *arg, int error, const struct err *err)
{
    struct verb_detach *verb = arg;
    struct control *control = verb->control;

    if (error < 0) {
        server_reply(verb->conn, NULL, err);
    } else {
        if (!control->is_lazy) {
            control->is_lazy = true;
            control->lazy_op =
                (struct ring_op){.done = lazy_look, .code = RING_TIMEOUT, .timeout_ns = LAZY_NS};
            ring_queue(control->server.ring, &control->lazy_op);
        }
        server_reply(verb->conn,
                     control_describe(control->facts, control_state_name(control), control->worker), NULL);
    }
    free(verb);
}

static void detach_drained(struct ring_op *op, int res)
{
    struct verb_detach *verb = container_of(op, struct verb_detach, op);
    struct control *control = verb->control;
    struct err refused = {.line = ""};

    if (!res || control->state != CONTROL_RUNS) {
        control_detach(control, verb->conn);
    } else {
        err_set(
            &refused, res,
            "%s: %llu bytes cannot be written to its image: %s; make that possible, or lose them by --force",
            control->facts->dir->name, (unsigned long long)verb->lost_bytes, strerror(-res));
        server_reply(verb->conn, NULL, &refused);
    }
    free(verb);
}

static void detach_drain_done(struct writeback_drain *drain, int error, uint64_t lost_bytes)
{
    struct verb_detach *verb = container_of(drain, struct verb_detach, drain);

    verb->lost_bytes = lost_bytes;
    ring_post(verb->control->server.ring, &verb->op, error);
}

// What is in memory goes to the image first: the end would only tell that it is lost.
static void detach_drain(struct verb_detach *verb)
{
    verb->op.done = detach_drained;
    verb->drain.done = detach_drain_done;
    writeback_drain(verb->control->worker->devs[0]->writeback, &verb->drain);
}

// Nobody uses the node any more, or err says who does.
static void detach_tried(void *arg, int error, const struct err *err)
{
    struct verb_detach *verb = arg;
    struct control *control = verb->control;
    struct err refused = {.line = ""};

    if (control->state != CONTROL_RUNS) { // it stops already
        err_set(&refused, -EBUSY, "%s: is stopping", control->facts->dir->name);
        server_reply(verb->conn, NULL, &refused);
    } else if (!error && !verb->is_forced && control->worker->devs[0]->writeback) {
        detach_drain(verb);
        return;
    } else if (!error || verb->is_forced) {
        control_detach(control, verb->conn);
    } else if (verb->is_lazy && error == -EBUSY) {
        node_do(&control->node, NODE_DETACH_LAZY, detach_begun_lazily, verb);
        return;
    } else {
        err_set(&refused, error, "%s: %.400s%s", control->facts->dir->name, err->line,
                strchr(err->line, ';') ? "" : "; wait for its end, or use --lazy or --force");
        server_reply(verb->conn, NULL, &refused);
    }
    free(verb);
}

static void verb_detach(struct control *control, struct server_conn *conn, struct json_object *request)
{
    struct verb_detach *verb;
    struct err err = {.line = "out of memory"};
    int ret;

    if (!control->worker) {
        control_detach(control, conn);
        return;
    }
    verb = calloc(1, sizeof(*verb));
    if (!verb) {
        server_reply(conn, NULL, &err);
        return;
    }
    *verb = (struct verb_detach){.control = control,
                                 .conn = conn,
                                 .is_lazy = asks_for(request, "lazy"),
                                 .is_forced = asks_for(request, "force")};
    // By force, nobody asks who: looking that up takes the longer the more processes there are.
    ret = verb->is_forced ? 0 : transports_busy(&control->worker->transports, &err);
    if (verb->is_forced || ret < 0)
        detach_tried(verb, ret, &err);
    else
        node_do(&control->node, NODE_DETACH, detach_tried, verb);
}

// ---- The table

static const struct verb {
    const char *name;
    unsigned states; // in which it may run
    const char *help;
    // Ends with server_reply(), now or later. request stays the caller's.
    void (*handle)(struct control *control, struct server_conn *conn, struct json_object *request);
} verbs[] = {
    {"show", CONTROL_RUNS | CONTROL_STOPS | CONTROL_GAVE_UP, "what it is, and how it is", verb_show},
    {"stats", CONTROL_RUNS | CONTROL_STOPS, "its counters", verb_stats},
    {"set", CONTROL_RUNS, "changes settings", verb_set},
    {"switch", CONTROL_RUNS, "takes another image", verb_switch},
    {"resize", CONTROL_RUNS, "takes over the image's size", verb_resize},
    {"detach", CONTROL_RUNS | CONTROL_GAVE_UP, "ends it", verb_detach},
};

static void control_handle(struct server *server, struct server_conn *conn, struct json_object *request)
{
    struct control *control = container_of(server, struct control, server);
    const char *name = "";
    struct json_object *verb;
    struct err err = {.line = ""};

    if (json_object_object_get_ex(request, "verb", &verb))
        name = json_object_get_string(verb) ? json_object_get_string(verb) : "";
    for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++) {
        if (strcmp(verbs[i].name, name))
            continue;
        if (verbs[i].states & control->state) {
            verbs[i].handle(control, conn, request);
        } else {
            err_set(&err, -EBUSY, "%s: %s: not while it is %s", control->facts->dir->name, name,
                    control_state_name(control));
            server_reply(conn, NULL, &err);
        }
        json_object_put(request);
        return;
    }
    err_usage(&err, "%.40s: no such verb; this is bight %s", name, BIGHT_VERSION);
    server_reply(conn, NULL, &err);
    json_object_put(request);
}

void control_start(struct control *control)
{
    control->server.handle = control_handle;
    server_start(&control->server);
}

void control_stop(struct control *control)
{
    control->state = CONTROL_STOPS;
    if (control->is_lazy)
        ring_cancel_timeout(control->server.ring, &control->lazy_op);
    server_stop(&control->server);
}

void control_end(struct control *control, int error, const struct err *err)
{
    struct err said = {.is_usage = false};

    if (!control->detaching)
        return;
    err_set(&said, error, "%s: what was written last may be lost; see the log", control->facts->dir->name);
    server_reply_last(control->detaching, error < 0 ? NULL : json_object_new_object(),
                      err->line[0] ? err : &said);
    control->detaching = NULL;
}
