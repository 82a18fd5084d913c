// NBD connections in process: requests over a socket pair to a device, and what comes back.
#include "fixture.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "session.h"

#define DISK_BYTES (256 * KiB + 100)

static const enum nbd_mode modes[] = {NBD_MODE_SIMPLE, NBD_MODE_STRUCTURED, NBD_MODE_EXTENDED};

struct server {
    struct fixture fixture;
    struct ring *ring; // of this thread
};

static struct server serve(void **state, const char *io, bool is_read_only)
{
    struct server server = {
        .fixture = fixture_create(&(struct fixture_options){.ring = ring_ops_of(state),
                                                            .io = io,
                                                            .size_bytes = DISK_BYTES,
                                                            .nr_queues = 2,
                                                            .image.is_read_only = is_read_only})};
    struct err err;

    assert_int_equal(ring_create(ring_ops_of(state), &server.ring, &err), 0);
    return server;
}

static void end(struct server *server)
{
    fixture_destroy(&server->fixture);
    ring_destroy(server->ring);
}

// Into the session itself: its address is what it is known by.
static void connect_to(struct server *server, struct session *session, enum nbd_mode mode)
{
    assert_true(session_begin(session, server->ring, server->fixture.dev, mode, true, "", 0));
}

// Sends the stream in pieces, and checks all replies.
static void talk(struct server *server, enum nbd_mode mode, struct wire *wire, size_t piece, bool is_early)
{
    struct asked_list list = session_number(wire->bytes, wire->len, mode);
    size_t early = is_early ? min_of(wire->len, 60000) : 0;
    struct session session;
    const char *wrong;

    assert_true(session_begin(&session, server->ring, server->fixture.dev, mode, true, wire->bytes, early));
    for (size_t at = early; at < wire->len; at += min_of(piece, wire->len - at))
        assert_true(session_send(&session, wire->bytes + at, min_of(piece, wire->len - at)));
    assert_true(session_finish(&session));
    wrong = session_check(&list, session.in.bytes, session.in.len, mode);
    if (wrong)
        fail_msg("mode %d: %s", (int)mode, wrong);
    assert_true(session_end(&session));
    free(list.asked);
}

static void put_write(struct wire *wire, enum nbd_mode mode, unsigned flags, uint64_t offset,
                      const void *data, uint32_t len)
{
    bool is_extended = mode == NBD_MODE_EXTENDED;

    wire_request(wire, is_extended, NBD_CMD_WRITE, flags | (is_extended ? NBD_CMD_FLAG_PAYLOAD_LEN : 0), 0,
                 offset, len);
    wire_put(wire, data, len);
}

static char data[DISK_BYTES];

// Requests of all kinds, in range and out of it, with right and wrong flags.
static void put_random(struct wire *wire, enum nbd_mode mode, uint64_t seed, unsigned nr_requests)
{
    for (unsigned i = 0; i < nr_requests; i++) {
        unsigned type = (unsigned)(unit_random(&seed) % 9), flags = 0;
        uint64_t offset = unit_random(&seed) % DISK_BYTES, len = unit_random(&seed) % 20000;

        if (type == NBD_CMD_DISC)
            type = NBD_CMD_FLUSH;
        if (type == NBD_CMD_READ && unit_random(&seed) % 4 == 0)
            len *= 10; // several chunks
        if (unit_random(&seed) % 8)
            len = min_of(len, DISK_BYTES - offset);
        if (unit_random(&seed) % 8 == 0)
            flags = (unsigned)(unit_random(&seed) & 0x1f);
        if (type == NBD_CMD_FLUSH)
            offset = len = 0;
        if (type == NBD_CMD_WRITE)
            put_write(wire, mode, flags, offset, data, (uint32_t)len);
        else
            wire_request(wire, mode == NBD_MODE_EXTENDED, type, flags, 0, offset, len);
    }
}

// Also where there is never room for all of an answer at once, as with 16 KiB (which are 32 to the kernel).
static void large_cached_reads_are_answered_by_a_socket_of_any_size(void **state)
{
    static const int sizes[] = {1, 10, 16, 17, 20, 30, 40, 60, 100, 200};
    struct server server = serve(state, "buffered", false);

    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        session_sndbuf_bytes = sizes[i] * (int)KiB;
        for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
            struct wire wire = {0};

            put_write(&wire, modes[m], 0, 0, data, DISK_BYTES); // cached
            for (uint64_t len = 16 * KiB; len <= 256 * KiB; len += 8 * KiB)
                wire_request(&wire, modes[m] == NBD_MODE_EXTENDED, NBD_CMD_READ, 0, len, DISK_BYTES - len,
                             len);
            talk(&server, modes[m], &wire, 100000, false);
            wire_free(&wire);
        }
    }
    session_sndbuf_bytes = 0;
    end(&server);
}

static void every_request_of_a_pipeline_is_answered_once(void **state)
{
    static const char *const ios[] = {"null", "buffered", "direct"};

    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct server server = serve(state, ios[i], false);

        for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
            struct wire wire = {0};

            put_random(&wire, modes[m], m + 1, 400);
            talk(&server, modes[m], &wire, 100000, false);
            wire.len = 0;
            put_random(&wire, modes[m], m + 11, 100);
            talk(&server, modes[m], &wire, 4099, true);
            wire_free(&wire);
        }
        end(&server);
    }
}

// Requests are let gather (ring/uring.c) while they come many at a time: none is to wait for one that never
// comes.
static void a_request_alone_is_answered_after_bursts(void **state)
{
    static const unsigned bursts[] = {64, 1, 1, 16, 1, 3, 64, 1};
    const size_t reply_bytes = NBD_SIMPLE_REPLY_BYTES + 512;
    struct server server = serve(state, "buffered", false);
    struct session session;
    size_t expected = 0;

    connect_to(&server, &session, NBD_MODE_SIMPLE);
    for (unsigned i = 0; i < 20 * ARRAY_SIZE(bursts); i++) {
        unsigned nr = bursts[i % ARRAY_SIZE(bursts)];
        struct wire wire = {0};

        for (unsigned j = 0; j < nr; j++)
            wire_request(&wire, false, NBD_CMD_READ, 0, j, j * 4096ULL % (256 * KiB), 512);
        expected += nr * reply_bytes;
        assert_true(session_send(&session, wire.bytes, wire.len));
        assert_true(session_receive(&session, expected));
        wire_free(&wire);
    }
    assert_true(session_end(&session));
    end(&server);
}

static void how_the_stream_is_cut_makes_no_difference(void **state)
{
    static const size_t pieces[] = {1, 7, 28, 33};
    struct server server = serve(state, "buffered", false);

    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        for (unsigned i = 0; i < ARRAY_SIZE(pieces); i++) {
            struct wire wire = {0};

            for (unsigned j = 0; j < 10; j++) {
                put_write(&wire, modes[m], 0, j * 100, data, j * 30);
                wire_request(&wire, modes[m] == NBD_MODE_EXTENDED, NBD_CMD_READ, 0, 0, j * 1000, 100);
            }
            talk(&server, modes[m], &wire, pieces[i], false);
            wire_free(&wire);
        }
    }
    end(&server);
}

static void what_was_written_is_read_back(void **state)
{
    static const char *const ios[] = {"buffered", "direct"};

    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct server server = serve(state, ios[i], false);
        struct session session;
        struct wire wire = {0};

        connect_to(&server, &session, NBD_MODE_SIMPLE);
        for (size_t at = 0; at < DISK_BYTES; at += 60001) // each behind the other: they share blocks
            put_write(&wire, NBD_MODE_SIMPLE, 0, at, data + at, (uint32_t)min_of(60001, DISK_BYTES - at));
        assert_true(session_send(&session, wire.bytes, wire.len));
        assert_true(session_receive(&session, 5 * NBD_SIMPLE_REPLY_BYTES));
        session.in.len = wire.len = 0;
        wire_request(&wire, false, NBD_CMD_READ, 0, 42, 0, DISK_BYTES);
        assert_true(session_send(&session, wire.bytes, wire.len));
        assert_true(session_receive(&session, NBD_SIMPLE_REPLY_BYTES + DISK_BYTES));
        assert_int_equal(be_get32(session.in.bytes + 4), 0);
        assert_int_equal(be_get64(session.in.bytes + 8), 42);
        assert_memory_equal(session.in.bytes + NBD_SIMPLE_REPLY_BYTES, data, DISK_BYTES);
        wire_free(&wire);
        assert_true(session_end(&session));
        end(&server);
    }
}

// The error of one request in simple mode, with what stands behind it to be answered with success.
static uint32_t error_of(struct server *server, unsigned type, unsigned flags, uint64_t offset, uint64_t len)
{
    struct session session;
    struct wire wire = {0};
    uint32_t error;

    connect_to(server, &session, NBD_MODE_SIMPLE);
    wire_request(&wire, false, type, flags, 1, offset, len);
    if (type == NBD_CMD_WRITE)
        memset(wire_grow(&wire, len), 0, len);
    wire_request(&wire, false, NBD_CMD_CACHE, 0, 2, 0, 512);
    assert_true(session_send(&session, wire.bytes, wire.len));
    assert_true(session_receive(&session, 2 * NBD_SIMPLE_REPLY_BYTES));
    error = be_get32(session.in.bytes + (be_get64(session.in.bytes + 8) == 1 ? 4 : 20));
    assert_int_equal(session.in.len, 2 * NBD_SIMPLE_REPLY_BYTES);
    wire_free(&wire);
    assert_true(session_end(&session));
    return error;
}

static void what_is_refused_is_answered_and_its_payload_skipped(void **state)
{
    struct server server = serve(state, "buffered", false);

    assert_int_equal(error_of(&server, NBD_CMD_READ, 0, DISK_BYTES, 1), NBD_EINVAL);
    assert_int_equal(error_of(&server, NBD_CMD_WRITE, 0, DISK_BYTES - 1, 2), NBD_ENOSPC);
    assert_int_equal(error_of(&server, NBD_CMD_WRITE, 0, UINT64_MAX, 70000), NBD_ENOSPC);
    assert_int_equal(error_of(&server, NBD_CMD_WRITE, 0x8000, 0, 70000), NBD_EINVAL);
    assert_int_equal(error_of(&server, NBD_CMD_WRITE, 0, 0, LIMITS_MAX_TRANSFER_BYTES + 1), NBD_ENOSPC);
    assert_int_equal(error_of(&server, NBD_CMD_READ, 0, 0, UINT32_MAX), NBD_EINVAL);
    assert_int_equal(error_of(&server, NBD_CMD_READ, NBD_CMD_FLAG_DF, 0, 512), NBD_EINVAL);
    assert_int_equal(error_of(&server, NBD_CMD_TRIM, 0, 1, DISK_BYTES), NBD_EINVAL);
    assert_int_equal(error_of(&server, NBD_CMD_WRITE_ZEROES, 0, 1, DISK_BYTES), NBD_ENOSPC);
    assert_int_equal(error_of(&server, 99, 0, 0, 512), NBD_EINVAL);
    end(&server);
}

static void a_read_only_device_answers_eperm(void **state)
{
    struct server server = serve(state, "buffered", true);

    assert_int_equal(error_of(&server, NBD_CMD_WRITE, 0, 0, 512), NBD_EPERM);
    assert_int_equal(error_of(&server, NBD_CMD_TRIM, 0, 0, 512), NBD_EPERM);
    assert_int_equal(error_of(&server, NBD_CMD_WRITE_ZEROES, 0, 0, 512), NBD_EPERM);
    assert_int_equal(error_of(&server, NBD_CMD_FLUSH, 0, 0, 0), 0);
    end(&server);
}

static void rubbish_hangs_up(void **state)
{
    struct server server = serve(state, "null", false);

    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        struct session session;
        char rubbish[100];

        memset(rubbish, 0x25, sizeof(rubbish));
        connect_to(&server, &session, modes[m]);
        assert_true(session_send(&session, rubbish, sizeof(rubbish)));
        assert_true(session_finish(&session));
        assert_int_equal(session.in.len, 0);
        assert_true(session_end(&session));
    }
    end(&server);
}

static void disc_ends_it_after_all_replies(void **state)
{
    struct server server = serve(state, "fault:io=buffered,any.delay=1:20", false);

    for (unsigned m = 0; m < 2 * ARRAY_SIZE(modes); m++) {
        enum nbd_mode mode = modes[m / 2];
        unsigned flags = m % 2 ? 0x8000 : 0; // unknown ones change nothing: there is no reply to DISC
        struct wire wire = {0};

        put_write(&wire, mode, 0, 0, data, 5000);
        wire_request(&wire, mode == NBD_MODE_EXTENDED, NBD_CMD_READ, 0, 0, 0, 5000);
        wire_request(&wire, mode == NBD_MODE_EXTENDED, NBD_CMD_DISC, flags, 0, 0, 0);
        wire_put(&wire, data, 1000); // is not looked at
        talk(&server, mode, &wire, 100000, false);
        wire_free(&wire);
    }
    end(&server);
}

// ---- Clients that misbehave

static void a_client_that_never_reads_holds_up_nobody_else(void **state)
{
    struct server server = serve(state, "null", false);
    struct session deaf[2];
    struct wire wire = {0};

    for (unsigned i = 0; i < 500; i++)
        wire_request(&wire, false, NBD_CMD_READ, 0, i, 0, 100000);
    for (unsigned i = 0; i < 2; i++) { // one for each queue
        size_t sent = 0;
        struct pollfd pfd;

        connect_to(&server, &deaf[i], NBD_MODE_SIMPLE);
        pfd = (struct pollfd){.fd = deaf[i].fd, .events = POLLOUT};
        // Until the server takes no more: the reply that waits to be sent keeps its tag.
        while (sent < wire.len && poll(&pfd, 1, 200) > 0) {
            ssize_t n = send(deaf[i].fd, wire.bytes + sent, wire.len - sent, MSG_NOSIGNAL);

            assert_true(n > 0);
            sent += (size_t)n;
        }
    }
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(error_of(&server, NBD_CMD_READ, 0, DISK_BYTES, 1), NBD_EINVAL);
    // One begins to read after all, and gets everything; the other one just goes.
    assert_true(session_receive(&deaf[0], 500 * (NBD_SIMPLE_REPLY_BYTES + 100000)));
    for (unsigned i = 0; i < 500; i++)
        assert_int_equal(be_get32(deaf[0].in.bytes + i * (NBD_SIMPLE_REPLY_BYTES + 100000)),
                         NBD_SIMPLE_REPLY_MAGIC);
    assert_true(session_end(&deaf[0]));
    assert_true(session_end(&deaf[1]));
    wire_free(&wire);
    end(&server);
}

static void a_hang_up_in_mid_payload_writes_nothing(void **state)
{
    struct server server = serve(state, "buffered", false);
    static const uint32_t sent[] = {0, 1, 100, 16384, 20000, 99999};
    char *check = malloc(100000);

    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        for (unsigned i = 0; i < ARRAY_SIZE(sent); i++) {
            struct session session;
            struct wire wire = {0};

            put_write(&wire, modes[m], 0, 0, data, 100000);
            wire.len -= 100000 - sent[i];
            connect_to(&server, &session, modes[m]);
            assert_true(session_send(&session, wire.bytes, wire.len));
            if (i % 2)
                assert_true(session_finish(&session));
            assert_true(session_end(&session));
            wire_free(&wire);
        }
    }
    assert_int_equal(fixture_do(server.fixture.dev, REQ_OP_READ, 0, 0, check, 100000), 0);
    for (unsigned i = 0; i < 100000; i++)
        assert_int_equal(check[i], 0);
    free(check);
    end(&server);
}

static void a_hang_up_with_requests_in_flight_waits_for_them(void **state)
{
    struct server server = serve(state, "fault:io=buffered,any.delay=1:30", false);

    for (unsigned i = 0; i < 3; i++) {
        struct session session;
        struct wire wire = {0};

        put_random(&wire, modes[i], i + 5, 40);
        connect_to(&server, &session, modes[i]);
        assert_int_equal(send(session.fd, wire.bytes, min_of(wire.len, 50000), MSG_NOSIGNAL),
                         min_of(wire.len, 50000));
        assert_true(session_end(&session));
        wire_free(&wire);
    }
    end(&server);
}

// ---- Messages

static void stop_answers_what_is_in_flight_and_takes_no_more(void **state)
{
    struct server server = serve(state, "fault:io=buffered,any.delay=1:100", false);

    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        struct session session;
        struct wire wire = {0};
        struct asked_list list;

        put_write(&wire, modes[m], 0, 0, data, 5000);
        wire_request(&wire, modes[m] == NBD_MODE_EXTENDED, NBD_CMD_READ, 0, 0, 0, 5000);
        list = session_number(wire.bytes, wire.len, modes[m]);
        assert_true(
            session_begin(&session, server.ring, server.fixture.dev, modes[m], true, wire.bytes, wire.len));
        nbd_conn_send(session.conn, &session.conn->stop_op);
        assert_true(session_finish(&session));
        assert_null(session_check(&list, session.in.bytes, session.in.len, modes[m]));
        assert_true(session_end(&session));
        free(list.asked);
        wire_free(&wire);
    }
    end(&server);
}

static void stop_and_abort_end_an_idle_connection_once(void **state)
{
    struct server server = serve(state, "null", false);

    for (unsigned kind = 1; kind < 8; kind++) {
        struct session session;

        connect_to(&server, &session, NBD_MODE_STRUCTURED);
        if (kind & 1)
            nbd_conn_send(session.conn, &session.conn->stop_op);
        if (kind & 2)
            nbd_conn_send(session.conn, &session.conn->abort_op);
        if (kind & 4)
            shutdown(session.fd, SHUT_RDWR);
        assert_true(session_finish(&session));
        assert_true(session_end(&session));
    }
    end(&server);
}

static void abort_ends_a_client_that_never_reads(void **state)
{
    struct server server = serve(state, "null", false);
    struct session session;
    struct wire wire = {0};
    struct pollfd pfd;

    for (unsigned i = 0; i < 50; i++)
        wire_request(&wire, false, NBD_CMD_READ, 0, i, 0, 200000);
    connect_to(&server, &session, NBD_MODE_SIMPLE);
    assert_true(send(session.fd, wire.bytes, wire.len, MSG_NOSIGNAL) > 0);
    pfd = (struct pollfd){.fd = session.fd, .events = POLLIN};
    assert_int_equal(poll(&pfd, 1, 10000), 1); // the first replies are on their way
    nbd_conn_send(session.conn, &session.conn->stop_op);
    nbd_conn_send(session.conn, &session.conn->abort_op);
    while (!session.is_closed) // with the client's side open
        assert_int_equal(ring_run(server.ring), 0);
    assert_true(session_end(&session));
    wire_free(&wire);
    end(&server);
}

static void connections_come_and_go_while_others_work(void **state)
{
    struct server server = serve(state, "direct", false);
    struct session sessions[6];
    struct wire wires[6] = {{0}};

    for (unsigned round = 0; round < 5; round++) {
        for (unsigned i = 0; i < ARRAY_SIZE(sessions); i++) {
            wires[i].len = 0;
            put_random(&wires[i], modes[i % 3], round * 10 + i + 1, 60);
            connect_to(&server, &sessions[i], modes[i % 3]);
            // What fits: nobody reads yet.
            assert_true(send(sessions[i].fd, wires[i].bytes, wires[i].len, MSG_NOSIGNAL) > 0);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(sessions); i++) {
            if (i % 2)
                assert_true(session_finish(&sessions[i]));
            assert_true(session_end(&sessions[i]));
        }
    }
    for (unsigned i = 0; i < ARRAY_SIZE(wires); i++)
        wire_free(&wires[i]);
    end(&server);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_request_of_a_pipeline_is_answered_once),
        cmocka_unit_test(large_cached_reads_are_answered_by_a_socket_of_any_size),
        cmocka_unit_test(a_request_alone_is_answered_after_bursts),
        cmocka_unit_test(how_the_stream_is_cut_makes_no_difference),
        cmocka_unit_test(what_was_written_is_read_back),
        cmocka_unit_test(what_is_refused_is_answered_and_its_payload_skipped),
        cmocka_unit_test(a_read_only_device_answers_eperm),
        cmocka_unit_test(rubbish_hangs_up),
        cmocka_unit_test(disc_ends_it_after_all_replies),
        cmocka_unit_test(a_client_that_never_reads_holds_up_nobody_else),
        cmocka_unit_test(a_hang_up_in_mid_payload_writes_nothing),
        cmocka_unit_test(a_hang_up_with_requests_in_flight_waits_for_them),
        cmocka_unit_test(stop_answers_what_is_in_flight_and_takes_no_more),
        cmocka_unit_test(stop_and_abort_end_an_idle_connection_once),
        cmocka_unit_test(abort_ends_a_client_that_never_reads),
        cmocka_unit_test(connections_come_and_go_while_others_work),
    };

    uint64_t seed = 3;

    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (char)unit_random(&seed);
    return run_on_both_rings(tests);
}
