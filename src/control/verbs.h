// What can be asked of an attached device over its control socket.
#pragma once

#include <sys/types.h>

#include "control/node.h"
#include "control/server.h"
#include "control/state.h"
#include "transport/transport.h"

struct worker;

#define CONTROL_DEVICE_BYTES 512

enum control_state {
    CONTROL_RUNS = 1 << 0,
    CONTROL_STOPS = 1 << 1,
    CONTROL_GAVE_UP = 1 << 2, // there is no worker, and none will be started
};

// What is known of a device, in supervisor and worker.
struct control_facts {
    const struct state *dir;
    const char *image; // as asked for
    const struct transport_holds *holds;
    char device[CONTROL_DEVICE_BYTES]; // what attach has printed
    pid_t supervisor_pid;
    pid_t worker_pid; // as of its last state; 0: none
    unsigned nr_restarts;
    char reason[256]; // of the last restart, or of giving up
    time_t attached_at;
};

struct control {
    struct server server; // its ring, fd and nr_pending are the caller's to set
    enum control_state state;
    const struct control_facts *facts;
    struct worker *worker;                 // GAVE_UP: NULL
    struct node node;                      // with a worker
    void (*stop)(struct control *control); // detach: it may end now
    struct server_conn *detaching;         // who waits for the end
    struct ring_op lazy_op;                // --lazy: looks again
    bool is_lazy;
};

// Begins to answer.
void control_start(struct control *control);

// No more requests; what is under way is answered.
void control_stop(struct control *control);

// After the last ring has gone: tells who waits for it.
void control_end(struct control *control, int error, const struct err *err);

// What "show" answers, without what only a worker knows when there is none.
struct json_object *control_describe(const struct control_facts *facts, const char *state,
                                     const struct worker *worker);
