#include "unit.h"

#include <stdlib.h>
#include <string.h>

#include "core/device.h"
#include "transport/nbd/handshake.h"
#include "wire.h"

static char name_first[] = "first", name_second[] = "a second one";
static struct image writable, read_only = {.is_read_only = true};
static struct device first = {
    .name = name_first,
    .image = &writable,
    .limits = {.size_bytes = 123456789,
               .min_block_bytes = 1,
               .preferred_block_bytes = 4096,
               .max_transfer_bytes = LIMITS_MAX_TRANSFER_BYTES},
    .durability = {.has_volatile_cache = true},
};
static struct device second = {
    .name = name_second,
    .image = &read_only,
    .limits = {.size_bytes = 512,
               .min_block_bytes = 512,
               .preferred_block_bytes = 8192,
               .max_transfer_bytes = LIMITS_MAX_TRANSFER_BYTES},
};
static struct device *const devs[] = {&first, &second};

// The server's side, driven as server.c does it, and all that it has sent.
struct talk {
    struct nbd_handshake handshake;
    struct wire out;
    size_t max_out; // sent for one message
    size_t at;      // of out, for expect()
    uint8_t *in;
    size_t in_len;
};

static void talk_take_out(struct talk *talk)
{
    wire_put(&talk->out, talk->handshake.out, talk->handshake.out_len);
    talk->max_out = max_of(talk->max_out, talk->handshake.out_len);
    talk->handshake.out_len = 0;
}

static struct talk talk_begin(void)
{
    struct talk talk = {.in = malloc(NBD_HANDSHAKE_IN_BYTES)};

    assert_int_equal(nbd_handshake_begin(&talk.handshake, devs, ARRAY_SIZE(devs)), 0);
    talk_take_out(&talk);
    return talk;
}

static void talk_end(struct talk *talk)
{
    nbd_handshake_end(&talk->handshake);
    wire_free(&talk->out);
    free(talk->in);
}

// Feeds it in pieces of that many bytes, 0: of random length.
static void talk_feed(struct talk *talk, const uint8_t *in, size_t len, size_t piece)
{
    uint64_t seed = 99;
    size_t used;

    while (len && talk->handshake.state == NBD_HANDSHAKE_GOES_ON) {
        size_t n = piece ? piece : 1 + unit_random(&seed) % 40;

        n = min_of(n, min_of(len, NBD_HANDSHAKE_IN_BYTES - talk->in_len));
        assert_true(n > 0); // else it would wait for ever
        memcpy(talk->in + talk->in_len, in, n);
        talk->in_len += n;
        in += n;
        len -= n;
        do {
            // Of the exact size: sanitizers see what looks further.
            uint8_t *exact = malloc(talk->in_len + !talk->in_len);

            memcpy(exact, talk->in, talk->in_len);
            used = nbd_handshake_input(&talk->handshake, exact, talk->in_len);
            free(exact);
            assert_true(used <= talk->in_len);
            talk->in_len -= used;
            memmove(talk->in, talk->in + used, talk->in_len);
            talk_take_out(talk);
        } while (used && talk->handshake.state == NBD_HANDSHAKE_GOES_ON);
    }
}

// After the greeting and the client's flags.
static struct talk talk_with(struct wire *wire)
{
    struct talk talk = talk_begin();
    struct wire flags = {0};

    wire_client_flags(&flags, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    talk_feed(&talk, flags.bytes, flags.len, 4);
    wire_free(&flags);
    talk.at = 18;
    talk_feed(&talk, wire->bytes, wire->len, 1000);
    wire_free(wire);
    return talk;
}

// The next reply; its data.
static const uint8_t *expect(struct talk *talk, uint32_t option, uint32_t type, uint32_t len)
{
    const uint8_t *at = talk->out.bytes + talk->at;

    assert_true(talk->out.len - talk->at >= 20 + len);
    assert_true(be_get64(at) == NBD_OPT_REPLY_MAGIC);
    assert_int_equal(be_get32(at + 8), option);
    assert_int_equal(be_get32(at + 12), type);
    assert_int_equal(be_get32(at + 16), len);
    talk->at += 20 + len;
    return at + 20;
}

// An error may have any text.
static void expect_error(struct talk *talk, uint32_t option, uint32_t type)
{
    assert_true(talk->out.len - talk->at >= 20);
    expect(talk, option, type, be_get32(talk->out.bytes + talk->at + 16));
}

static void expect_end(struct talk *talk, enum nbd_handshake_state state)
{
    assert_int_equal(talk->out.len, talk->at);
    assert_int_equal(talk->handshake.state, state);
    talk_end(talk);
}

static void expect_go(struct talk *talk, uint32_t option, const struct device *dev, bool has_name)
{
    const uint8_t *data = expect(talk, option, NBD_REP_INFO, 12);

    assert_int_equal(be_get16(data), NBD_INFO_EXPORT);
    assert_int_equal(be_get64(data + 2), dev->limits.size_bytes);
    assert_int_equal(be_get16(data + 10), nbd_transmission_flags(dev, talk->handshake.mode));
    data = expect(talk, option, NBD_REP_INFO, 14);
    assert_int_equal(be_get16(data), NBD_INFO_BLOCK_SIZE);
    assert_int_equal(be_get32(data + 2), dev->limits.min_block_bytes);
    assert_int_equal(be_get32(data + 6), dev->limits.preferred_block_bytes);
    assert_int_equal(be_get32(data + 10), dev->limits.max_transfer_bytes);
    if (has_name) {
        data = expect(talk, option, NBD_REP_INFO, (uint32_t)(2 + strlen(dev->name)));
        assert_int_equal(be_get16(data), NBD_INFO_NAME);
        assert_memory_equal(data + 2, dev->name, strlen(dev->name));
    }
    expect(talk, option, NBD_REP_ACK, 0);
}

// ---- Greeting and flags

static void it_greets_in_fixed_newstyle(void **state)
{
    struct talk talk = talk_begin();

    (void)state;
    assert_int_equal(talk.out.len, 18);
    assert_memory_equal(talk.out.bytes, "NBDMAGICIHAVEOPT\0\3", 18);
    talk_end(&talk);
}

static void unknown_client_flags_close_the_connection(void **state)
{
    (void)state;
    for (unsigned bit = 0; bit < 32; bit++) {
        struct talk talk = talk_begin();
        struct wire wire = {0};

        wire_client_flags(&wire, 1U << bit);
        talk_feed(&talk, wire.bytes, wire.len, 1);
        assert_int_equal(talk.handshake.state, bit < 2 ? NBD_HANDSHAKE_GOES_ON : NBD_HANDSHAKE_CLOSE);
        assert_int_equal(talk.out.len, 18);
        wire_free(&wire);
        talk_end(&talk);
    }
}

// ---- EXPORT_NAME

static void export_name_of(const char *name, uint32_t client_flags, const struct device *dev)
{
    struct talk talk = talk_begin();
    struct wire wire = {0};
    size_t padding = client_flags & NBD_FLAG_NO_ZEROES ? 0 : 124;

    wire_client_flags(&wire, client_flags);
    wire_option(&wire, NBD_OPT_EXPORT_NAME, name, (uint32_t)strlen(name));
    wire_put(&wire, "request", 7);
    talk_feed(&talk, wire.bytes, wire.len, 1000);
    assert_int_equal(talk.handshake.state, NBD_HANDSHAKE_DONE);
    assert_ptr_equal(talk.handshake.dev, dev);
    assert_int_equal(talk.out.len, 18 + 10 + padding);
    assert_int_equal(be_get64(talk.out.bytes + 18), dev->limits.size_bytes);
    assert_int_equal(be_get16(talk.out.bytes + 26), nbd_transmission_flags(dev, NBD_MODE_SIMPLE));
    for (size_t i = 0; i < padding; i++)
        assert_int_equal(talk.out.bytes[28 + i], 0);
    // What follows is the transmission phase's.
    assert_int_equal(talk.in_len, 7);
    assert_memory_equal(talk.in, "request", 7);
    wire_free(&wire);
    talk_end(&talk);
}

static void export_name_begins_the_transmission(void **state)
{
    (void)state;
    for (uint32_t flags = 0; flags < 4; flags++) {
        export_name_of("", flags, &first);
        export_name_of("first", flags, &first);
        export_name_of("a second one", flags, &second);
    }
}

static void export_name_of_an_unknown_export_hangs_up(void **state)
{
    static const char *const names[] = {"x", "firs", "first ", "First", "a second"};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        struct wire wire = {0};
        struct talk talk;

        wire_option(&wire, NBD_OPT_EXPORT_NAME, names[i], (uint32_t)strlen(names[i]));
        talk = talk_with(&wire);
        expect_end(&talk, NBD_HANDSHAKE_CLOSE);
    }
}

static void export_name_after_extended_headers_hangs_up(void **state)
{
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option(&wire, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
    wire_option(&wire, NBD_OPT_EXPORT_NAME, "first", 5);
    talk = talk_with(&wire);
    expect(&talk, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, 0);
    expect_end(&talk, NBD_HANDSHAKE_CLOSE);
}

// ---- ABORT, LIST, unknown ones

static void abort_is_acknowledged_and_ends_it(void **state)
{
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option(&wire, NBD_OPT_ABORT, "why", 3);
    wire_option(&wire, NBD_OPT_LIST, NULL, 0);
    talk = talk_with(&wire);
    expect(&talk, NBD_OPT_ABORT, NBD_REP_ACK, 0);
    expect_end(&talk, NBD_HANDSHAKE_CLOSE);
}

static void list_names_every_export(void **state)
{
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option(&wire, NBD_OPT_LIST, "x", 1);
    wire_option(&wire, NBD_OPT_LIST, NULL, 0);
    talk = talk_with(&wire);
    expect_error(&talk, NBD_OPT_LIST, NBD_REP_ERR_INVALID);
    for (unsigned i = 0; i < ARRAY_SIZE(devs); i++) {
        const char *name = devs[i]->name;
        const uint8_t *data = expect(&talk, NBD_OPT_LIST, NBD_REP_SERVER, (uint32_t)(4 + strlen(name)));

        assert_int_equal(be_get32(data), strlen(name));
        assert_memory_equal(data + 4, name, strlen(name));
    }
    expect(&talk, NBD_OPT_LIST, NBD_REP_ACK, 0);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
}

static void unknown_options_are_refused_and_it_goes_on(void **state)
{
    static const uint32_t options[] = {0, 4, NBD_OPT_STARTTLS, 12, 1000, UINT32_MAX};
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(options); i++)
        wire_option(&wire, options[i], "some data", i);
    wire_option(&wire, NBD_OPT_ABORT, NULL, 0);
    talk = talk_with(&wire);
    for (unsigned i = 0; i < ARRAY_SIZE(options); i++)
        expect_error(&talk, options[i], NBD_REP_ERR_UNSUP);
    expect(&talk, NBD_OPT_ABORT, NBD_REP_ACK, 0);
    expect_end(&talk, NBD_HANDSHAKE_CLOSE);
}

static void a_wrong_option_magic_hangs_up(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 64; i++) {
        struct wire wire = {0};
        struct talk talk;

        wire_put64(&wire, NBD_OPT_MAGIC ^ 1ULL << i);
        wire_put32(&wire, NBD_OPT_LIST);
        wire_put32(&wire, 0);
        talk = talk_with(&wire);
        expect_end(&talk, NBD_HANDSHAKE_CLOSE);
    }
}

// ---- INFO and GO

static void go_tells_of_the_export_and_ends_the_handshake(void **state)
{
    static const uint16_t infos[] = {NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE, 77,
                                     NBD_INFO_NAME};
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_go(&wire, NBD_OPT_GO, "a second one", infos, ARRAY_SIZE(infos));
    wire_put(&wire, "request", 7);
    talk = talk_with(&wire);
    assert_ptr_equal(talk.handshake.dev, &second);
    assert_int_equal(talk.in_len, 7);
    expect_go(&talk, NBD_OPT_GO, &second, true);
    expect_end(&talk, NBD_HANDSHAKE_DONE);
}

static void info_tells_the_same_and_it_goes_on(void **state)
{
    static const uint16_t name_info[] = {NBD_INFO_NAME};
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_go(&wire, NBD_OPT_INFO, "first", NULL, 0);
    wire_go(&wire, NBD_OPT_INFO, "", name_info, 1);
    wire_go(&wire, NBD_OPT_INFO, "nothing", NULL, 0);
    wire_go(&wire, NBD_OPT_GO, "nothing", NULL, 0);
    wire_go(&wire, NBD_OPT_GO, "", NULL, 0);
    talk = talk_with(&wire);
    expect_go(&talk, NBD_OPT_INFO, &first, false);
    expect_go(&talk, NBD_OPT_INFO, &first, true);
    expect_error(&talk, NBD_OPT_INFO, NBD_REP_ERR_UNKNOWN);
    expect_error(&talk, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN);
    expect_go(&talk, NBD_OPT_GO, &first, false);
    assert_ptr_equal(talk.handshake.dev, &first);
    expect_end(&talk, NBD_HANDSHAKE_DONE);
}

// GO or INFO whose name length, info count or data length is off by something.
static void go_with(uint32_t option, uint32_t name_len, uint16_t nr_infos, uint32_t data_len, bool is_valid)
{
    uint8_t data[64] = {0};
    struct wire wire = {0};
    struct talk talk;

    be_put32(data, name_len);
    memcpy(data + 4, "first", 5);
    be_put16(data + 9, nr_infos);
    wire_option(&wire, option, data, data_len);
    talk = talk_with(&wire);
    if (is_valid) {
        assert_int_not_equal(be_get32(talk.out.bytes + talk.at + 12), NBD_REP_ERR_INVALID);
        talk_end(&talk);
        return;
    }
    expect_error(&talk, option, NBD_REP_ERR_INVALID);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
}

static void go_with_lengths_that_do_not_add_up_is_invalid(void **state)
{
    static const uint32_t name_lens[] = {0,         1,  4,  6,     7,         58,
                                         59,        60, 64, 65536, INT32_MAX, UINT32_MAX - 5,
                                         UINT32_MAX};

    (void)state;
    for (uint32_t option = NBD_OPT_INFO; option <= NBD_OPT_GO; option++) {
        for (uint32_t len = 0; len <= 64; len++)
            go_with(option, 5, 0, len, len == 11);
        for (unsigned nr = 0; nr < 300; nr++)
            go_with(option, 5, (uint16_t)nr, 31, nr == 10);
        go_with(option, 5, 0x8000, 11, false); // twice that is 2^16
        go_with(option, 5, 0xffff, 11, false);
        for (unsigned i = 1; i < ARRAY_SIZE(name_lens); i++)
            go_with(option, name_lens[i], 0, 11, false);
    }
}

// ---- STRUCTURED_REPLY, EXTENDED_HEADERS

static void modes_only_go_up(void **state)
{
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, "x", 1);
    wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    wire_option(&wire, NBD_OPT_EXTENDED_HEADERS, "x", 1);
    wire_option(&wire, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
    wire_option(&wire, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
    wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    talk = talk_with(&wire);
    expect_error(&talk, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_INVALID);
    expect(&talk, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, 0);
    expect_error(&talk, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_INVALID);
    expect_error(&talk, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ERR_INVALID);
    expect(&talk, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ACK, 0);
    expect_error(&talk, NBD_OPT_EXTENDED_HEADERS, NBD_REP_ERR_INVALID);
    expect_error(&talk, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ERR_EXT_HEADER_REQD);
    assert_int_equal(talk.handshake.mode, NBD_MODE_EXTENDED);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
}

// ---- Metadata contexts

static void expect_context(struct talk *talk, uint32_t option, uint32_t id)
{
    const uint8_t *data = expect(talk, option, NBD_REP_META_CONTEXT, 4 + 15);

    assert_int_equal(be_get32(data), id);
    assert_memory_equal(data + 4, "base:allocation", 15);
    expect(talk, option, NBD_REP_ACK, 0);
}

static void contexts_are_listed_by_name_or_wildcard(void **state)
{
    const uint32_t option = NBD_OPT_LIST_META_CONTEXT;
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    wire_meta_context(&wire, option, "first", NULL);
    wire_meta_context(&wire, option, "first", "base:");
    wire_meta_context(&wire, option, "", "base:allocation");
    wire_meta_context(&wire, option, "first", "base:alloc");
    wire_meta_context(&wire, option, "first", "qemu:");
    wire_meta_context(&wire, option, "first", "");
    wire_meta_context(&wire, option, "none", "base:");
    talk = talk_with(&wire);
    expect(&talk, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, 0);
    for (unsigned i = 0; i < 3; i++)
        expect_context(&talk, option, 0);
    for (unsigned i = 0; i < 3; i++)
        expect(&talk, option, NBD_REP_ACK, 0);
    expect_error(&talk, option, NBD_REP_ERR_UNKNOWN);
    assert_null(talk.handshake.meta_dev);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
}

static struct device *selected_after(uint32_t mode_option, void (*put)(struct wire *wire))
{
    struct wire wire = {0};
    struct talk talk;
    struct device *dev;

    if (mode_option)
        wire_option(&wire, mode_option, NULL, 0);
    put(&wire);
    talk = talk_with(&wire);
    assert_int_equal(talk.handshake.state, NBD_HANDSHAKE_GOES_ON);
    dev = talk.handshake.meta_dev;
    talk_end(&talk);
    return dev;
}

static void put_select(struct wire *wire)
{
    wire_meta_context(wire, NBD_OPT_SET_META_CONTEXT, "a second one", "base:allocation");
}

static void put_select_wildcard(struct wire *wire)
{
    wire_meta_context(wire, NBD_OPT_SET_META_CONTEXT, "first", "base:");
}

static void put_select_nothing(struct wire *wire)
{
    put_select(wire);
    wire_meta_context(wire, NBD_OPT_SET_META_CONTEXT, "a second one", NULL);
}

static void put_select_unknown(struct wire *wire)
{
    put_select(wire);
    wire_meta_context(wire, NBD_OPT_SET_META_CONTEXT, "nothing", "base:allocation");
}

static void put_select_malformed(struct wire *wire)
{
    put_select(wire);
    wire_option(wire, NBD_OPT_SET_META_CONTEXT, "xyz", 3);
}

static void put_select_too_big(struct wire *wire)
{
    put_select(wire);
    wire_option_head(wire, NBD_OPT_SET_META_CONTEXT, NBD_MAX_OPTION_BYTES + 1);
}

static void put_select_then_list(struct wire *wire)
{
    put_select(wire);
    wire_meta_context(wire, NBD_OPT_LIST_META_CONTEXT, "first", "base:");
}

static void a_context_is_selected_by_its_name_only(void **state)
{
    (void)state;
    assert_ptr_equal(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select), &second);
    assert_ptr_equal(selected_after(NBD_OPT_EXTENDED_HEADERS, put_select), &second);
    assert_null(selected_after(0, put_select)); // before structured replies
    assert_null(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select_wildcard));
}

static void a_selection_that_fails_undoes_the_one_before(void **state)
{
    (void)state;
    assert_null(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select_nothing));
    assert_null(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select_unknown));
    assert_null(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select_malformed));
    assert_null(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select_too_big));
    assert_ptr_equal(selected_after(NBD_OPT_STRUCTURED_REPLY, put_select_then_list), &second);
}

static void contexts_need_structured_replies(void **state)
{
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_meta_context(&wire, NBD_OPT_LIST_META_CONTEXT, "first", NULL);
    wire_meta_context(&wire, NBD_OPT_SET_META_CONTEXT, "first", "base:allocation");
    talk = talk_with(&wire);
    expect_error(&talk, NBD_OPT_LIST_META_CONTEXT, NBD_REP_ERR_INVALID);
    expect_error(&talk, NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_INVALID);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
}

static void meta_with(const uint8_t *data, uint32_t len, bool is_valid)
{
    struct wire wire = {0};
    struct talk talk;

    wire_option(&wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    wire_option(&wire, NBD_OPT_SET_META_CONTEXT, data, len);
    talk = talk_with(&wire);
    expect(&talk, NBD_OPT_STRUCTURED_REPLY, NBD_REP_ACK, 0);
    if (is_valid)
        expect_context(&talk, NBD_OPT_SET_META_CONTEXT, NBD_CONTEXT_ID);
    else
        expect_error(&talk, NBD_OPT_SET_META_CONTEXT, NBD_REP_ERR_INVALID);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
}

static void contexts_with_lengths_that_do_not_add_up_are_invalid(void **state)
{
    static const uint32_t lens[] = {0,         1, 4, 6, 14, 16, 32, 255, 65536, INT32_MAX, UINT32_MAX - 3,
                                    UINT32_MAX};
    uint8_t good[4 + 5 + 4 + 4 + 15 + 4] = {0}, bad[sizeof(good)];

    (void)state;
    be_put32(good, 5);
    memcpy(good + 4, "first", 5);
    be_put32(good + 9, 2);
    be_put32(good + 13, 15);
    memcpy(good + 17, "base:allocation", 15);
    be_put32(good + 32, 0);
    meta_with(good, sizeof(good), true);
    for (uint32_t len = 0; len < sizeof(good); len++)
        meta_with(good, len, false);
    for (unsigned i = 0; i < ARRAY_SIZE(lens); i++) {
        static const unsigned at[] = {0, 9, 13, 32};

        for (unsigned j = 0; j < ARRAY_SIZE(at); j++) {
            if (be_get32(good + at[j]) == lens[i])
                continue;
            memcpy(bad, good, sizeof(good));
            be_put32(bad + at[j], lens[i]);
            meta_with(bad, sizeof(bad), false);
        }
    }
}

// ---- Large data, pieces, bounds

static void option_data_up_to_the_limit_is_looked_at_and_beyond_it_skipped(void **state)
{
    char *data = calloc(1, NBD_MAX_OPTION_BYTES + 1000);
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option(&wire, NBD_OPT_LIST, data, NBD_MAX_OPTION_BYTES);
    wire_option(&wire, NBD_OPT_LIST, data, NBD_MAX_OPTION_BYTES + 1);
    wire_option(&wire, NBD_OPT_GO, data, NBD_MAX_OPTION_BYTES + 1000);
    wire_option(&wire, 4711, data, NBD_MAX_OPTION_BYTES + 1000);
    wire_option(&wire, NBD_OPT_ABORT, NULL, 0);
    talk = talk_with(&wire);
    expect_error(&talk, NBD_OPT_LIST, NBD_REP_ERR_INVALID);
    expect_error(&talk, NBD_OPT_LIST, NBD_REP_ERR_TOO_BIG);
    expect_error(&talk, NBD_OPT_GO, NBD_REP_ERR_TOO_BIG);
    expect_error(&talk, 4711, NBD_REP_ERR_TOO_BIG);
    expect(&talk, NBD_OPT_ABORT, NBD_REP_ACK, 0);
    expect_end(&talk, NBD_HANDSHAKE_CLOSE);
    free(data);
}

static void four_gigabytes_of_option_data_are_skipped_without_keeping_them(void **state)
{
    struct wire wire = {0};
    uint8_t *piece = calloc(1, NBD_HANDSHAKE_IN_BYTES);
    struct talk talk;

    (void)state;
    wire_option_head(&wire, NBD_OPT_INFO, UINT32_MAX);
    talk = talk_with(&wire);
    expect_error(&talk, NBD_OPT_INFO, NBD_REP_ERR_TOO_BIG);
    for (uint64_t left = UINT32_MAX; left;) {
        size_t n = min_of(left, NBD_HANDSHAKE_IN_BYTES);

        assert_int_equal(nbd_handshake_input(&talk.handshake, piece, n), n);
        assert_int_equal(talk.handshake.out_len, 0);
        left -= n;
    }
    wire_option(&wire, NBD_OPT_LIST, "x", 1);
    talk_feed(&talk, wire.bytes, wire.len, 1);
    expect_error(&talk, NBD_OPT_LIST, NBD_REP_ERR_INVALID);
    expect_end(&talk, NBD_HANDSHAKE_GOES_ON);
    wire_free(&wire);
    free(piece);
}

static void too_long_an_export_name_hangs_up(void **state)
{
    struct wire wire = {0};
    struct talk talk;

    (void)state;
    wire_option_head(&wire, NBD_OPT_EXPORT_NAME, NBD_MAX_OPTION_BYTES + 1);
    talk = talk_with(&wire);
    expect_end(&talk, NBD_HANDSHAKE_CLOSE);
}

// One of everything.
static void put_all(struct wire *wire)
{
    static const uint16_t infos[] = {NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_INFO_DESCRIPTION,
                                     NBD_INFO_BLOCK_SIZE};

    wire_client_flags(wire, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    wire_option(wire, NBD_OPT_LIST, NULL, 0);
    wire_option(wire, NBD_OPT_STARTTLS, NULL, 0);
    wire_go(wire, NBD_OPT_INFO, "first", infos, ARRAY_SIZE(infos));
    wire_option(wire, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
    wire_meta_context(wire, NBD_OPT_LIST_META_CONTEXT, "first", NULL);
    wire_meta_context(wire, NBD_OPT_SET_META_CONTEXT, "first", "base:allocation");
    wire_go(wire, NBD_OPT_INFO, "unknown", NULL, 0);
    wire_option(wire, 99, "rubbish", 7);
    wire_option(wire, NBD_OPT_EXTENDED_HEADERS, NULL, 0);
    wire_go(wire, NBD_OPT_GO, "a second one", infos, ARRAY_SIZE(infos));
}

static void how_the_input_is_cut_makes_no_difference(void **state)
{
    static const size_t pieces[] = {1, 2, 3, 5, 16, 17, 31, 0};
    struct wire wire = {0};
    struct talk whole = talk_begin();

    (void)state;
    put_all(&wire);
    talk_feed(&whole, wire.bytes, wire.len, wire.len);
    assert_int_equal(whole.handshake.state, NBD_HANDSHAKE_DONE);
    for (unsigned i = 0; i < ARRAY_SIZE(pieces); i++) {
        struct talk talk = talk_begin();

        talk_feed(&talk, wire.bytes, wire.len, pieces[i]);
        assert_int_equal(talk.handshake.state, NBD_HANDSHAKE_DONE);
        assert_ptr_equal(talk.handshake.dev, &second);
        assert_ptr_equal(talk.handshake.meta_dev, &first);
        assert_int_equal(talk.handshake.mode, NBD_MODE_EXTENDED);
        assert_int_equal(talk.in_len, 0);
        assert_int_equal(talk.out.len, whole.out.len);
        assert_memory_equal(talk.out.bytes, whole.out.bytes, whole.out.len);
        talk_end(&talk);
    }
    talk_end(&whole);
    wire_free(&wire);
}

static void what_waits_to_be_sent_is_bounded_however_much_is_asked(void **state)
{
    const size_t go_len = 16 + 4 + strlen(name_second) + 2 + 8;
    struct wire all = {0};
    struct talk talk = talk_begin();

    (void)state;
    put_all(&all);
    talk_feed(&talk, all.bytes, 4, 4);
    for (unsigned i = 0; i < 500; i++)
        talk_feed(&talk, all.bytes + 4, all.len - 4 - go_len, 4096);
    assert_int_equal(talk.handshake.state, NBD_HANDSHAKE_GOES_ON);
    assert_true(talk.out.len > 100000);
    assert_true(talk.max_out < 1000);
    assert_true(talk.handshake.out_size < 2000);
    wire_free(&all);
    talk_end(&talk);
}

static void transmission_flags_say_what_the_device_can(void **state)
{
    const unsigned always = NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE;
    const unsigned writes = NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    const unsigned flushes = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA;
    struct device null = first;

    (void)state;
    null.durability.has_volatile_cache = false;
    assert_int_equal(nbd_transmission_flags(&first, NBD_MODE_SIMPLE), always | writes | flushes);
    assert_int_equal(nbd_transmission_flags(&first, NBD_MODE_STRUCTURED),
                     always | writes | flushes | NBD_FLAG_SEND_DF);
    assert_int_equal(nbd_transmission_flags(&first, NBD_MODE_EXTENDED),
                     always | writes | flushes | NBD_FLAG_SEND_DF);
    assert_int_equal(nbd_transmission_flags(&second, NBD_MODE_SIMPLE), always | NBD_FLAG_READ_ONLY);
    assert_int_equal(nbd_transmission_flags(&null, NBD_MODE_SIMPLE), always | writes);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(it_greets_in_fixed_newstyle),
        cmocka_unit_test(unknown_client_flags_close_the_connection),
        cmocka_unit_test(export_name_begins_the_transmission),
        cmocka_unit_test(export_name_of_an_unknown_export_hangs_up),
        cmocka_unit_test(export_name_after_extended_headers_hangs_up),
        cmocka_unit_test(abort_is_acknowledged_and_ends_it),
        cmocka_unit_test(list_names_every_export),
        cmocka_unit_test(unknown_options_are_refused_and_it_goes_on),
        cmocka_unit_test(a_wrong_option_magic_hangs_up),
        cmocka_unit_test(go_tells_of_the_export_and_ends_the_handshake),
        cmocka_unit_test(info_tells_the_same_and_it_goes_on),
        cmocka_unit_test(go_with_lengths_that_do_not_add_up_is_invalid),
        cmocka_unit_test(modes_only_go_up),
        cmocka_unit_test(contexts_are_listed_by_name_or_wildcard),
        cmocka_unit_test(a_context_is_selected_by_its_name_only),
        cmocka_unit_test(a_selection_that_fails_undoes_the_one_before),
        cmocka_unit_test(contexts_need_structured_replies),
        cmocka_unit_test(contexts_with_lengths_that_do_not_add_up_are_invalid),
        cmocka_unit_test(option_data_up_to_the_limit_is_looked_at_and_beyond_it_skipped),
        cmocka_unit_test(four_gigabytes_of_option_data_are_skipped_without_keeping_them),
        cmocka_unit_test(too_long_an_export_name_hangs_up),
        cmocka_unit_test(how_the_input_is_cut_makes_no_difference),
        cmocka_unit_test(what_waits_to_be_sent_is_bounded_however_much_is_asked),
        cmocka_unit_test(transmission_flags_say_what_the_device_can),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
