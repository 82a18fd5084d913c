#include "unit.h"

#include <errno.h>
#include <string.h>

#include "transport/nbd/conn.h"
#include "util/be.h"

static const enum nbd_mode modes[] = {NBD_MODE_SIMPLE, NBD_MODE_STRUCTURED, NBD_MODE_EXTENDED};

struct fields {
    uint16_t flags, type;
    uint64_t cookie, offset, len;
};

// In a buffer of exactly the header's size, so that sanitizers see a look behind its end.
static struct nbd_request parse(enum nbd_mode mode, bool has_meta, const struct fields *f)
{
    struct nbd_request request;
    size_t bytes = nbd_request_bytes(mode);
    uint8_t head[bytes];

    be_put32(head, mode == NBD_MODE_EXTENDED ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC);
    be_put16(head + 4, f->flags);
    be_put16(head + 6, f->type);
    be_put64(head + 8, f->cookie);
    be_put64(head + 16, f->offset);
    if (mode == NBD_MODE_EXTENDED)
        be_put64(head + 24, f->len);
    else
        be_put32(head + 24, (uint32_t)f->len);
    memset(&request, 0xaa, sizeof(request));
    assert_int_equal(nbd_request_parse(head, mode, has_meta, &request), 0);
    return request;
}

static void every_field_is_where_the_protocol_has_it(void **state)
{
    struct fields f = {.type = NBD_CMD_WRITE, .cookie = 0x1122334455667788, .offset = 0xa1b2c3d4e5f60718};

    (void)state;
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        struct nbd_request request;

        f.len = modes[m] == NBD_MODE_EXTENDED ? 0x0102030405060708 : 0xfedcba98;
        request = parse(modes[m], false, &f);
        assert_int_equal(request.flags, 0);
        assert_int_equal(request.type, NBD_CMD_WRITE);
        assert_int_equal(request.cookie, f.cookie);
        assert_int_equal(request.offset_bytes, f.offset);
        assert_int_equal(request.len_bytes, f.len);
        assert_int_equal(request.payload_bytes, f.len);
        assert_int_equal(request.error, 0);
    }
}

static void a_wrong_magic_ends_the_stream(void **state)
{
    (void)state;
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        uint32_t magic = modes[m] == NBD_MODE_EXTENDED ? NBD_EXTENDED_REQUEST_MAGIC : NBD_REQUEST_MAGIC;
        uint8_t head[NBD_EXTENDED_REQUEST_BYTES] = {0};
        struct nbd_request request;

        for (unsigned bit = 0; bit < 32; bit++) {
            be_put32(head, magic ^ (1U << bit));
            assert_int_equal(nbd_request_parse(head, modes[m], true, &request), -EBADMSG);
        }
        be_put32(head, modes[m] == NBD_MODE_EXTENDED ? NBD_REQUEST_MAGIC : NBD_EXTENDED_REQUEST_MAGIC);
        assert_int_equal(nbd_request_parse(head, modes[m], true, &request), -EBADMSG);
    }
}

// Which flags may stand with which command, as the protocol's "Request types" say.
static uint16_t allowed(unsigned type, enum nbd_mode mode)
{
    uint16_t flags = NBD_CMD_FLAG_FUA;

    if (type == NBD_CMD_READ && mode != NBD_MODE_SIMPLE)
        flags |= NBD_CMD_FLAG_DF;
    if (type == NBD_CMD_WRITE && mode == NBD_MODE_EXTENDED)
        flags |= NBD_CMD_FLAG_PAYLOAD_LEN;
    if (type == NBD_CMD_WRITE_ZEROES)
        flags |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    if (type == NBD_CMD_BLOCK_STATUS)
        flags |= NBD_CMD_FLAG_REQ_ONE;
    return flags;
}

static void every_flag_is_taken_with_its_commands_only(void **state)
{
    (void)state;
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        for (unsigned type = 0; type <= NBD_CMD_BLOCK_STATUS; type++) {
            for (unsigned flags = 0; flags < 0x10000; flags++) {
                struct fields f = {.type = (uint16_t)type, .flags = (uint16_t)flags};
                struct nbd_request request;

                if (type != NBD_CMD_FLUSH)
                    f.len = 4096;
                request = parse(modes[m], true, &f);
                assert_int_equal(request.error, flags & ~allowed(type, modes[m]) ? -EINVAL : 0);
                assert_int_equal(request.flags, flags);
            }
        }
    }
}

static void commands_that_do_not_exist_are_refused(void **state)
{
    (void)state;
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        for (unsigned type = NBD_CMD_BLOCK_STATUS + 1; type < 0x10000; type++) {
            struct fields f = {.type = (uint16_t)type, .len = 512};
            struct nbd_request request = parse(modes[m], true, &f);

            assert_int_equal(request.error, -EINVAL);
            assert_int_equal(request.payload_bytes, 0);
        }
    }
}

static void only_writes_have_a_payload_in_the_old_modes(void **state)
{
    (void)state;
    for (unsigned m = 0; m < 2; m++) {
        for (unsigned type = 0; type < 20; type++) {
            for (unsigned flags = 0; flags < 64; flags++) {
                struct fields f = {.type = (uint16_t)type, .flags = (uint16_t)flags, .len = 0xffffffff};

                assert_int_equal(parse(modes[m], true, &f).payload_bytes,
                                 type == NBD_CMD_WRITE ? 0xffffffff : 0);
            }
        }
    }
}

static void extended_headers_tell_by_a_flag_that_there_is_a_payload(void **state)
{
    (void)state;
    for (unsigned type = 0; type < 20; type++) {
        for (unsigned flags = 0; flags < 64; flags++) {
            struct fields f = {.type = (uint16_t)type, .flags = (uint16_t)flags, .len = UINT64_MAX};
            bool has_payload = type == NBD_CMD_WRITE || (flags & NBD_CMD_FLAG_PAYLOAD_LEN);

            assert_int_equal(parse(NBD_MODE_EXTENDED, true, &f).payload_bytes, has_payload ? UINT64_MAX : 0);
        }
    }
}

static void a_flush_with_offset_or_length_is_refused(void **state)
{
    (void)state;
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        assert_int_equal(parse(modes[m], true, &(struct fields){.type = NBD_CMD_FLUSH}).error, 0);
        assert_int_equal(parse(modes[m], true, &(struct fields){.type = NBD_CMD_FLUSH, .len = 1}).error,
                         -EINVAL);
        assert_int_equal(parse(modes[m], true, &(struct fields){.type = NBD_CMD_FLUSH, .offset = 1}).error,
                         -EINVAL);
    }
}

static void block_status_needs_a_context_and_a_length(void **state)
{
    (void)state;
    for (unsigned m = 0; m < ARRAY_SIZE(modes); m++) {
        struct fields f = {.type = NBD_CMD_BLOCK_STATUS, .len = 512};

        assert_int_equal(parse(modes[m], true, &f).error, 0);
        assert_int_equal(parse(modes[m], false, &f).error, -EINVAL);
        f.len = 0;
        assert_int_equal(parse(modes[m], true, &f).error, -EINVAL);
    }
}

static void errors_are_those_of_the_protocol(void **state)
{
    static const struct {
        int error;
        uint32_t nbd;
    } errors[] = {
        {0, 0},
        {-EPERM, NBD_EPERM},
        {-EACCES, NBD_EPERM},
        {-EROFS, NBD_EPERM},
        {-EIO, NBD_EIO},
        {-ENOMEM, NBD_ENOMEM},
        {-EINVAL, NBD_EINVAL},
        {-ENOSPC, NBD_ENOSPC},
        {-EDQUOT, NBD_ENOSPC},
        {-EFBIG, NBD_ENOSPC},
        {-EOVERFLOW, NBD_EOVERFLOW},
        {-EOPNOTSUPP, NBD_ENOTSUP},
        {-ETIMEDOUT, NBD_EIO},
        {-EBADF, NBD_EIO},
        {-ENXIO, NBD_EIO},
    };

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(errors); i++)
        assert_int_equal(nbd_error(errors[i].error), errors[i].nbd);
    for (int error = -1; error > -4096; error--)
        assert_int_not_equal(nbd_error(error), 0);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_field_is_where_the_protocol_has_it),
        cmocka_unit_test(a_wrong_magic_ends_the_stream),
        cmocka_unit_test(every_flag_is_taken_with_its_commands_only),
        cmocka_unit_test(commands_that_do_not_exist_are_refused),
        cmocka_unit_test(only_writes_have_a_payload_in_the_old_modes),
        cmocka_unit_test(extended_headers_tell_by_a_flag_that_there_is_a_payload),
        cmocka_unit_test(a_flush_with_offset_or_length_is_refused),
        cmocka_unit_test(block_status_needs_a_context_and_a_length),
        cmocka_unit_test(errors_are_those_of_the_protocol),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
