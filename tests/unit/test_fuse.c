#include "fixture.h"

#include <linux/falloc.h>

#include "fuse_kernel.h"

#define SIZE (1 * MiB)

struct fuse_test {
    struct fixture fixture;
    struct ring *main_ring;
    struct kernel kernel;
    uint64_t unique;
};

static struct fuse_test *begin(void **state, const struct fixture_options *options)
{
    struct fuse_test *test = calloc(1, sizeof(*test));
    struct fixture_options all = *options;
    struct err err;

    all.ring = ring_ops_of(state);
    test->fixture = fixture_create(&all);
    assert_int_equal(ring_create(all.ring, &test->main_ring, &err), 0);
    assert_true(kernel_begin(&test->kernel, test->fixture.dev, test->main_ring));
    return test;
}

static void end(struct fuse_test *test)
{
    assert_true(kernel_end(&test->kernel));
    fixture_stop(&test->fixture);
    fixture_destroy(&test->fixture);
    ring_destroy(test->main_ring);
    kernel_free(&test->kernel);
    free(test);
}

static void send_request(struct fuse_test *test, uint32_t opcode, const void *args, size_t args_bytes)
{
    struct fuse_in_header header = {.len = (uint32_t)(sizeof(header) + args_bytes),
                                    .opcode = opcode,
                                    .unique = ++test->unique,
                                    .nodeid = FUSE_ROOT_ID};

    assert_true(kernel_send(&test->kernel, header, args, args_bytes));
}

// Its error, and what it answers behind the header.
static int ask(struct fuse_test *test, uint32_t opcode, const void *args, size_t args_bytes,
               const void **answer)
{
    const struct fuse_out_header *out = (const struct fuse_out_header *)(const void *)test->kernel.in;

    send_request(test, opcode, args, args_bytes);
    assert_true(kernel_receive(&test->kernel, KERNEL_PATIENCE_MS));
    assert_true(out->unique == test->unique);
    if (answer)
        *answer = out + 1;
    if (out->error)
        assert_int_equal(out->len, sizeof(*out));
    return out->error;
}

static int ask_read(struct fuse_test *test, uint64_t offset, uint32_t len, const void **data)
{
    return ask(test, FUSE_READ, &(struct fuse_read_in){.offset = offset, .size = len},
               sizeof(struct fuse_read_in), data);
}

// len of the message's data may be another one than that which it tells.
static int ask_write(struct fuse_test *test, uint64_t offset, const void *data, size_t len, uint32_t told_len)
{
    struct {
        struct fuse_write_in in;
        uint8_t data[KERNEL_PAYLOAD_BYTES];
    } *msg = calloc(1, sizeof(*msg));
    const struct fuse_write_out *out;
    int ret;

    msg->in = (struct fuse_write_in){.offset = offset, .size = told_len};
    memcpy(msg->data, data, len);
    ret = ask(test, FUSE_WRITE, msg, sizeof(msg->in) + len, (const void **)&out);
    free(msg);
    return ret ? ret : (int)out->size;
}

static size_t answer_bytes(const struct fuse_test *test)
{
    return test->kernel.in_bytes - sizeof(struct fuse_out_header);
}

static void what_was_written_is_read(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    uint8_t data[5000];
    const void *read;

    memset(data, 0xb1, sizeof(data));
    assert_int_equal(ask_write(test, 777, data, sizeof(data), sizeof(data)), sizeof(data));
    assert_int_equal(ask_read(test, 777, sizeof(data), &read), 0);
    assert_int_equal(answer_bytes(test), sizeof(data));
    assert_memory_equal(read, data, sizeof(data));
    assert_int_equal(ask(test, FUSE_FSYNC, &(struct fuse_fsync_in){0}, sizeof(struct fuse_fsync_in), NULL),
                     0);
    end(test);
}

static void requests_at_the_end_are_short(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    static const uint8_t data[4096];

    assert_int_equal(ask_read(test, SIZE - 100, 4096, NULL), 0);
    assert_int_equal(answer_bytes(test), 100);
    assert_int_equal(ask_read(test, SIZE, 4096, NULL), 0);
    assert_int_equal(answer_bytes(test), 0);
    assert_int_equal(ask_read(test, INT64_MAX, 4096, NULL), 0);
    assert_int_equal(answer_bytes(test), 0);
    assert_int_equal(ask_write(test, SIZE - 100, data, 4096, 4096), 100);
    assert_int_equal(ask_write(test, SIZE, data, 4096, 4096), -ENOSPC);
    end(test);
}

static void messages_that_make_no_sense_are_refused(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    static const uint32_t with_args[] = {FUSE_READ,    FUSE_WRITE,     FUSE_OPEN,
                                         FUSE_SETATTR, FUSE_FALLOCATE, FUSE_LSEEK};
    static const uint8_t zeroes[4096];

    for (unsigned i = 0; i < ARRAY_SIZE(with_args); i++) {
        for (unsigned len = 0; len < 8; len += 7)
            assert_int_equal(ask(test, with_args[i], zeroes, len, NULL), -EINVAL);
    }
    assert_int_equal(ask_write(test, 0, zeroes, 4096, 4095), -EINVAL);
    assert_int_equal(ask_write(test, 0, zeroes, 10, 4096), -EINVAL);
    assert_int_equal(ask_read(test, UINT64_MAX, 4096, NULL), -EINVAL);
    assert_int_equal(ask_read(test, 0, KERNEL_PAYLOAD_BYTES + 1, NULL), -EINVAL);
    assert_int_equal(ask(test, 12345, zeroes, 8, NULL), -ENOSYS);
    end(test);
}

static void a_message_that_is_not_as_long_as_it_says_is_passed_over(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "null"});
    struct fuse_in_header header = {.len = 7, .opcode = FUSE_STATFS, .unique = 99};

    assert_true(kernel_send(&test->kernel, header, NULL, 0));
    header.len = sizeof(header) + 1;
    assert_true(kernel_send(&test->kernel, header, NULL, 0));
    assert_int_equal(send(test->kernel.fd, &header, 3, 0), 3);
    assert_int_equal(ask(test, FUSE_STATFS, NULL, 0, NULL), 0); // the first answer that comes
    end(test);
}

static void what_needs_no_answer_gets_none(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "null"});
    static const uint8_t zeroes[64];

    for (unsigned i = 0; i < 300; i++) { // more than there are tags
        send_request(test, FUSE_FORGET, zeroes, sizeof(struct fuse_forget_in));
        send_request(test, FUSE_BATCH_FORGET, zeroes, sizeof(struct fuse_batch_forget_in));
        send_request(test, FUSE_INTERRUPT, zeroes, sizeof(struct fuse_interrupt_in));
        if (i % 10 == 9)
            assert_int_equal(ask(test, FUSE_STATFS, NULL, 0, NULL), 0);
    }
    end(test);
}

static void the_file_is_the_device(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    const struct fuse_attr_out *attr;
    struct fuse_setattr_in set = {.valid = FATTR_SIZE, .size = SIZE};

    assert_int_equal(ask(test, FUSE_GETATTR, &(struct fuse_getattr_in){0}, sizeof(struct fuse_getattr_in),
                         (const void **)&attr),
                     0);
    assert_int_equal(attr->attr.size, SIZE);
    assert_int_equal(attr->attr.mode & S_IFMT, S_IFREG);
    assert_int_equal(ask(test, FUSE_SETATTR, &set, sizeof(set), NULL), 0);
    set.size = SIZE - 1;
    assert_int_equal(ask(test, FUSE_SETATTR, &set, sizeof(set), NULL), -EPERM);
    set.valid = FATTR_MODE;
    assert_int_equal(ask(test, FUSE_SETATTR, &set, sizeof(set), NULL), -EPERM);
    end(test);
}

static void direct_is_opened_as_asked_and_read_only_is_kept(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.image.is_read_only = true});
    const struct fuse_open_out *open;
    struct fuse_open_in in = {.flags = O_RDWR};
    static const uint8_t data[512];

    assert_int_equal(ask(test, FUSE_OPEN, &in, sizeof(in), NULL), -EROFS);
    in.flags = O_RDONLY;
    assert_int_equal(ask(test, FUSE_OPEN, &in, sizeof(in), (const void **)&open), 0);
    assert_false(open->open_flags & FOPEN_DIRECT_IO);
    in.flags = O_RDONLY | O_DIRECT;
    assert_int_equal(ask(test, FUSE_OPEN, &in, sizeof(in), (const void **)&open), 0);
    assert_true(open->open_flags & FOPEN_DIRECT_IO);
    assert_int_equal(ask_write(test, 0, data, sizeof(data), sizeof(data)), -EPERM);
    end(test);
}

static int ask_fallocate(struct fuse_test *test, uint32_t mode, uint64_t offset, uint64_t len)
{
    struct fuse_fallocate_in in = {.mode = mode, .offset = offset, .length = len};

    return ask(test, FUSE_FALLOCATE, &in, sizeof(in), NULL);
}

static int64_t ask_lseek(struct fuse_test *test, int whence, uint64_t offset)
{
    struct fuse_lseek_in in = {.whence = (uint32_t)whence, .offset = offset};
    const struct fuse_lseek_out *out;
    int ret = ask(test, FUSE_LSEEK, &in, sizeof(in), (const void **)&out);

    return ret ? ret : (int64_t)out->offset;
}

static void holes_are_made_and_found(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    uint8_t data[KERNEL_PAYLOAD_BYTES];

    memset(data, 1, sizeof(data));
    assert_int_equal(ask_write(test, 256 * KiB, data, sizeof(data), sizeof(data)), sizeof(data));
    assert_int_equal(ask_lseek(test, SEEK_DATA, 0), 256 * KiB);
    assert_int_equal(ask_lseek(test, SEEK_DATA, 256 * KiB + 5), 256 * KiB + 5);
    assert_int_equal(ask_lseek(test, SEEK_HOLE, 256 * KiB + 5), 320 * KiB);
    assert_int_equal(ask_lseek(test, SEEK_DATA, 320 * KiB), -ENXIO);
    assert_int_equal(ask_fallocate(test, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 2 * SIZE), 0);
    assert_int_equal(ask_lseek(test, SEEK_DATA, 0), -ENXIO);
    assert_int_equal(ask_lseek(test, SEEK_HOLE, SIZE), -ENXIO);
    assert_int_equal(ask_lseek(test, SEEK_CUR, 0), -EINVAL);
    assert_int_equal(ask_fallocate(test, FALLOC_FL_ZERO_RANGE, SIZE - 4096, 8192), -EFBIG);
    assert_int_equal(ask_fallocate(test, FALLOC_FL_ZERO_RANGE, UINT64_MAX >> 1, UINT64_MAX), -EFBIG);
    assert_int_equal(ask_fallocate(test, 0, 0, SIZE), -EOPNOTSUPP);
    assert_int_equal(ask_fallocate(test, FALLOC_FL_COLLAPSE_RANGE, 0, 4096), -EOPNOTSUPP);
    end(test);
}

static void more_requests_than_tags_are_all_answered_once(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    struct fuse_read_in in = {.size = 512};
    bool *is_answered;
    unsigned nr = 0, nr_sent = 0;

    is_answered = calloc(1000, sizeof(*is_answered));
    while (nr < 1000) {
        if (nr_sent < 1000 && nr_sent < nr + 150) {
            send_request(test, FUSE_READ, &in, sizeof(in));
            nr_sent++;
            continue;
        }
        assert_true(kernel_receive(&test->kernel, KERNEL_PATIENCE_MS));
        {
            uint64_t unique = ((const struct fuse_out_header *)(const void *)test->kernel.in)->unique;

            assert_true(unique >= 1 && unique <= 1000 && !is_answered[unique - 1]);
            is_answered[unique - 1] = true;
        }
        nr++;
    }
    free(is_answered);
    end(test);
}

struct blocked {
    struct freeze freeze;
    sem_t frozen;
};

static void told_frozen(struct freeze *freeze)
{
    sem_post(&container_of(freeze, struct blocked, freeze)->frozen);
}

static void a_device_that_is_being_changed_makes_them_wait(void **state)
{
    struct fuse_test *test = begin(state, &(struct fixture_options){.io = "buffered"});
    struct blocked blocked = {.freeze.frozen = told_frozen};

    sem_init(&blocked.frozen, 0, 0);
    device_freeze(test->fixture.dev, &blocked.freeze);
    sem_wait(&blocked.frozen);
    send_request(test, FUSE_GETATTR, &(struct fuse_getattr_in){0}, sizeof(struct fuse_getattr_in));
    assert_false(kernel_receive(&test->kernel, 50));
    device_unfreeze(test->fixture.dev);
    assert_true(kernel_receive(&test->kernel, KERNEL_PATIENCE_MS));
    sem_destroy(&blocked.frozen);
    end(test);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_was_written_is_read),
        cmocka_unit_test(requests_at_the_end_are_short),
        cmocka_unit_test(messages_that_make_no_sense_are_refused),
        cmocka_unit_test(a_message_that_is_not_as_long_as_it_says_is_passed_over),
        cmocka_unit_test(what_needs_no_answer_gets_none),
        cmocka_unit_test(the_file_is_the_device),
        cmocka_unit_test(direct_is_opened_as_asked_and_read_only_is_kept),
        cmocka_unit_test(holes_are_made_and_found),
        cmocka_unit_test(more_requests_than_tags_are_all_answered_once),
        cmocka_unit_test(a_device_that_is_being_changed_makes_them_wait),
    };

    return run_on_both_rings(tests);
}
