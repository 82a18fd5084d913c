// An NBD connection in process: the server's side is nbd_conn on a socket pair, the client's side sends a
// stream of requests and checks what comes back against them. For unit tests and fuzzers alike.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ring/ring.h"
#include "transport/nbd/conn.h"
#include "wire.h"

struct session {
    int fd; // the client's
    struct nbd_conn *conn;
    struct ring *main_ring; // this thread's
    bool is_closed;         // nothing of the connection is left
    struct wire in;         // all that has come back
};

// The send buffer of the server's side of sessions begun from now on; 0: as the system makes it.
extern int session_sndbuf_bytes;

// early: what came behind the handshake (not NULL). false: no memory, or no sockets.
bool session_begin(struct session *session, struct ring *main_ring, struct device *dev, enum nbd_mode mode,
                   bool has_meta_context, const void *early, size_t early_len);

// Sends the bytes while it takes what comes back, up to where the server hangs up. false: it does not go on.
bool session_send(struct session *session, const void *bytes, size_t len);

// Takes what comes back until there are len bytes in all. false: there are no more.
bool session_receive(struct session *session, size_t len);

// No more requests; takes what comes back until the server hangs up. false: it does not.
bool session_finish(struct session *session);

// Closes the client's side if need be, and waits until the connection is gone. false: it does not go.
bool session_end(struct session *session);

// One request as the client sent it.
struct asked {
    uint16_t flags, type;
    uint64_t offset, len;
    bool is_complete; // all of its payload was sent
    bool is_done;
    uint64_t nr_read; // bytes that have come
    unsigned nr_chunks;
};

struct asked_list {
    struct asked *asked;
    size_t nr_asked;
    bool is_broken; // by a header that makes no sense: replies may be missing
};

// Reads the requests of a stream, and gives each one its number as its cookie.
struct asked_list session_number(uint8_t *bytes, size_t len, enum nbd_mode mode);

// NULL, or what is wrong with the replies: every request that was sent is answered once, by what is allowed.
const char *session_check(struct asked_list *list, const uint8_t *in, size_t in_len, enum nbd_mode mode);
