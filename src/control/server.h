// The control socket: one JSON object a line, one answer a line. On a ring, or without one at the end.
//
//   {"bight": 1, "verb": "show", ...}
//   {"bight": 1, "ok": true, ...} or {"bight": 1, "ok": false, "error": "...", "usage": false}
//   "ended": true as well when this is its last word: its processes are about to be gone
//
//  V1. Who connects is the server's own user, or root; everybody else is turned away unheard.
//  V2. Of a connection, a request is taken when the one before has been answered. Its line has at most
//      SERVER_LINE_BYTES, and comes and is answered in bounded time; there are at most
//      SERVER_MAX_CONNS connections.
//  V3. While a request is being answered, nothing of its connection is in flight on the ring.
#pragma once

#include <json-c/json.h>
#include <stdbool.h>

#include "ring/ring.h"
#include "util/log.h"

#define SERVER_VERSION 1
#define SERVER_LINE_BYTES (64 * 1024)
#define SERVER_MAX_CONNS 32

struct server_conn;

struct server {
    struct ring *ring;
    int fd; // that listens
    // A request came: ends, now or later, with server_reply(). Takes over request.
    void (*handle)(struct server *server, struct server_conn *conn, struct json_object *request);
    void *arg;            // for it
    unsigned *nr_pending; // counts connections
    struct server_conn *conns;
    unsigned nr_conns;
    bool is_stopping, is_polling;
    struct ring_op poll_op;
};

// server's ring, fd, handle, arg and nr_pending are set.
void server_start(struct server *server);

// No more requests; who is being answered gets it.
void server_stop(struct server *server);

// The answer. result: an object to put the envelope around, taken over; NULL with an error in err.
void server_reply(struct server_conn *conn, struct json_object *result, const struct err *err);

// Takes a connection off the ring that is to be answered by server_reply_last(), without a ring: the
// answer says "ended".
void server_park(struct server_conn *conn);
void server_reply_last(struct server_conn *conn, struct json_object *result, const struct err *err);

// An object as JSON (flags: json-c's), and so as UTF-8, which a path in it need not be; to be freed. NULL: no
// memory.
char *server_text(struct json_object *object, int flags);

// One line, without its end, as a request: an object of our version. NULL, with err set: none. For
// bytes from outside.
struct json_object *server_parse(const char *line, size_t len, struct err *err);
