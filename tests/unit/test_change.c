// Changes of a device in use: another image, size, io.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/change.h"
#include "io/io.h"
#include "ring/workers.h"

#define BLOCK 4096
#define DISK (64 * BLOCK)

static char page[BLOCK] __attribute__((aligned(BLOCK)));
static struct ring *main_ring; // the test's thread is the main one
static bool is_done;

static struct fixture setup(void **state, const char *io, bool is_read_only)
{
    struct err err;
    struct fixture fixture = fixture_create(&(struct fixture_options){
        .ring = ring_ops_of(state),
        .io = io,
        .size_bytes = DISK,
        .nr_queues = 2,
        .image = {.is_read_only = is_read_only, .is_format_raw = true},
    });

    assert_int_equal(ring_create(*state, &main_ring, &err), 0);
    return fixture;
}

static void teardown(struct fixture *fixture)
{
    int flush_error = atomic_load(&fixture->dev->flush_error);

    fixture_stop(fixture);
    ring_destroy(main_ring);
    assert_int_equal(fixture_destroy(fixture), flush_error);
}

static void change_done(struct device_change *change, int error)
{
    (void)change;
    (void)error;
    is_done = true;
}

static void begin(struct device_change *change, struct device *dev)
{
    is_done = false;
    device_change_init(change, dev, main_ring, change_done);
}

static int finish(struct device_change *change)
{
    device_change_start(change);
    while (!is_done)
        assert_int_equal(ring_run(main_ring), 0);
    return change->error;
}

static int set(struct device *dev, const char *key, const char *value)
{
    struct device_change change;

    begin(&change, dev);
    assert_int_equal(device_change_set(&change, key, value), 0);
    return finish(&change);
}

static int switch_to(struct device *dev, const char *path, struct err *err)
{
    struct device_change change;
    int ret;

    begin(&change, dev);
    assert_int_equal(device_change_image(&change, path), 0);
    ret = finish(&change);
    *err = change.err;
    return ret;
}

static int resize(struct device *dev)
{
    struct device_change change;

    begin(&change, dev);
    return finish(&change);
}

static int write_byte(struct device *dev, int byte, uint64_t offset)
{
    memset(page, byte, BLOCK);
    return fixture_do(dev, REQ_OP_WRITE, 0, offset, page, BLOCK);
}

static int byte_at(struct device *dev, uint64_t offset)
{
    memset(page, 0xee, BLOCK);
    assert_int_equal(fixture_do(dev, REQ_OP_READ, 0, offset, page, BLOCK), 0);
    return page[7];
}

static void in_file(const char *path, uint64_t offset, int byte)
{
    int fd = open(path, O_RDONLY);
    char got;

    assert_int_equal(pread(fd, &got, 1, (off_t)offset), 1);
    assert_int_equal(got, byte);
    close(fd);
}

static void a_switch_leaves_the_old_image_and_goes_on_with_the_new(void **state)
{
    struct fixture fixture = setup(state, "direct", false);
    struct device *dev = fixture.dev;
    char other[96];
    struct err err;
    int fd;

    snprintf(other, sizeof(other), "%s.other", fixture.path);
    fixture_make_file(other, DISK);
    assert_int_equal(write_byte(dev, 'a', 0), 0);
    assert_int_equal(switch_to(dev, other, &err), 0);
    assert_string_equal(dev->image->path, other);
    assert_int_equal(byte_at(dev, 0), 0);
    assert_int_equal(write_byte(dev, 'b', BLOCK), 0);
    in_file(fixture.path, 0, 'a');
    in_file(fixture.path, BLOCK, 0);
    in_file(other, BLOCK, 'b');

    fd = open(fixture.path, O_RDWR); // let go of, and the other one is held
    assert_int_equal(image_lock(fd, false), 0);
    close(fd);
    fd = open(other, O_RDWR);
    assert_int_equal(image_lock(fd, false), -EAGAIN);
    close(fd);
    unlink(other);
    teardown(&fixture);
}

static void a_switch_that_fails_changes_nothing(void **state)
{
    struct fixture fixture = setup(state, "direct", false);
    struct device *dev = fixture.dev;
    char other[96];
    struct err err;
    int fd;

    snprintf(other, sizeof(other), "%s.other", fixture.path);
    assert_int_equal(write_byte(dev, 'a', 0), 0);
    assert_int_equal(switch_to(dev, other, &err), -ENOENT);
    fixture_make_file(other, DISK + 1);
    assert_int_equal(switch_to(dev, other, &err), -EINVAL);
    assert_non_null(strstr(err.line, "sizes have to match"));
    assert_int_equal(truncate(other, DISK), 0);
    fd = open(other, O_RDWR);
    assert_int_equal(image_lock(fd, false), 0);
    assert_int_equal(switch_to(dev, other, &err), -EAGAIN);
    assert_non_null(strstr(err.line, "open for writing"));
    assert_string_equal(dev->image->path, fixture.path);
    assert_int_equal(byte_at(dev, 0), 'a');
    assert_int_equal(write_byte(dev, 'c', 0), 0);
    close(fd);
    in_file(fixture.path, 0, 'c');
    unlink(other);
    teardown(&fixture);
}

static void what_grew_is_served_and_what_shrank_is_refused(void **state)
{
    struct fixture fixture = setup(state, "direct", false);
    struct device *dev = fixture.dev;

    assert_int_equal(write_byte(dev, 'x', DISK), -ENOSPC);
    assert_int_equal(truncate(fixture.path, 2 * DISK + 100), 0);
    assert_int_equal(resize(dev), 0);
    assert_int_equal(dev->limits.size_bytes, 2 * DISK + 100);
    assert_int_equal(write_byte(dev, 'x', DISK), 0);
    assert_int_equal(byte_at(dev, DISK), 'x');
    assert_int_equal(fixture_do(dev, REQ_OP_WRITE, 0, 2 * DISK, page, 100), 0); // the part of a block
    in_file(fixture.path, 2 * DISK + 99, 'x');
    assert_int_equal(truncate(fixture.path, BLOCK), 0);
    assert_int_equal(resize(dev), 0);
    assert_int_equal(write_byte(dev, 'x', BLOCK), -ENOSPC);
    assert_int_equal(write_byte(dev, 'x', 0), 0);
    teardown(&fixture);
}

static void what_was_held_back_is_held_to_the_new_size(void **state)
{
    struct fixture fixture = setup(state, "buffered", false);
    struct device *dev = fixture.dev;
    struct fixture_rq frqs[32];
    struct device_change change;

    for (unsigned round = 0; round < 10; round++) {
        assert_int_equal(truncate(fixture.path, DISK), 0);
        assert_int_equal(resize(dev), 0);
        begin(&change, dev);
        assert_int_equal(truncate(fixture.path, BLOCK), 0);
        device_change_start(&change);
        for (unsigned i = 0; i < 32; i++) {
            fixture_rq_init(&frqs[i], REQ_OP_WRITE, 0, BLOCK, page, BLOCK);
            fixture_submit(&dev->queues[i % 2], &frqs[i]);
        }
        while (!is_done)
            assert_int_equal(ring_run(main_ring), 0);
        for (unsigned i = 0; i < 32; i++) {
            int error = fixture_wait(&frqs[i]);

            assert_true(error == 0 || error == -ENOSPC);
        }
        assert_int_equal(write_byte(dev, 'x', BLOCK), -ENOSPC);
    }
    teardown(&fixture);
}

static void the_io_changes_while_writes_are_in_flight(void **state)
{
    static const char *const ios[] = {"buffered", "direct", "fault:io=buffered", "direct"};
    struct fixture fixture = setup(state, "direct", false);
    struct device *dev = fixture.dev;
    struct fixture_rq frqs[64];
    static char bytes[64][100];

    if (!dev->image->is_direct) {
        teardown(&fixture);
        skip();
    }
    for (unsigned round = 0; round < 20; round++) {
        const char *io = ios[round % ARRAY_SIZE(ios)];

        for (unsigned i = 0; i < 64; i++) { // unaligned: direct asks for a freeze of its own
            memset(bytes[i], (int)(round + i), 100);
            fixture_rq_init(&frqs[i], REQ_OP_WRITE, 0, i * 100, bytes[i], 100);
            fixture_submit(&dev->queues[i % 2], &frqs[i]);
        }
        assert_int_equal(set(dev, "io", io), 0);
        assert_string_equal(dev->options.io, io);
        assert_int_equal(strncmp(dev->io->ops->name, io, strlen(dev->io->ops->name)), 0);
        for (unsigned i = 0; i < 64; i++)
            assert_int_equal(fixture_wait(&frqs[i]), 0);
        for (unsigned i = 0; i < 64; i++)
            in_file(fixture.path, i * 100 + 50, (char)(round + i));
    }
    teardown(&fixture);
}

static void settings_that_do_not_exist_are_refused(void **state)
{
    static const char *const wrong[][2] = {
        {"io", "null"}, {"readonly", "yes"}, {"readonly", ""}, {"depth", "3"}, {"", ""}, {"name", "x"},
    };
    struct fixture fixture = setup(state, "buffered", false);
    struct device_change change;

    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++) {
        begin(&change, fixture.dev);
        assert_int_equal(device_change_set(&change, wrong[i][0], wrong[i][1]), -EINVAL);
        assert_true(change.err.line[0] && change.err.is_usage);
        device_change_end(&change);
    }
    assert_int_equal(set(fixture.dev, "io", "nothing"), -EINVAL);
    assert_int_equal(set(fixture.dev, "io", "buffered:x"), -EINVAL);
    assert_int_equal(set(fixture.dev, "map", "circular"), -EINVAL);
    assert_string_equal(fixture.dev->options.io, "buffered");
    assert_string_equal(fixture.dev->options.map, "linear");
    assert_int_equal(write_byte(fixture.dev, 'x', 0), 0);
    teardown(&fixture);
}

static void all_settings_or_none(void **state)
{
    struct fixture fixture = setup(state, "buffered", false);
    struct device_change change;

    begin(&change, fixture.dev);
    assert_int_equal(device_change_set(&change, "readonly", "on"), 0);
    assert_int_equal(device_change_set(&change, "map", "circular"), 0);
    assert_int_equal(finish(&change), -EINVAL);
    assert_false(fixture.dev->image->is_read_only);
    assert_int_equal(write_byte(fixture.dev, 'x', 0), 0);
    teardown(&fixture);
}

static void read_only_and_back(void **state)
{
    struct fixture fixture = setup(state, "buffered", false);
    struct device *dev = fixture.dev;
    int fd = open(fixture.path, O_RDWR);

    assert_int_equal(write_byte(dev, 'x', 0), 0);
    assert_int_equal(set(dev, "readonly", "on"), 0);
    assert_int_equal(write_byte(dev, 'y', 0), -EPERM);
    assert_int_equal(byte_at(dev, 0), 'x');
    assert_int_equal(image_lock(fd, true), 0);
    assert_int_equal(set(dev, "readonly", "off"), -EAGAIN); // somebody relies on it
    assert_int_equal(write_byte(dev, 'y', 0), -EPERM);
    image_unlock(fd);
    assert_int_equal(set(dev, "readonly", "off"), 0);
    assert_int_equal(write_byte(dev, 'y', 0), 0);
    assert_int_equal(image_lock(fd, true), -EAGAIN);
    close(fd);
    teardown(&fixture);
}

static void what_was_opened_for_reading_is_opened_for_writing(void **state)
{
    struct fixture fixture = setup(state, "direct", true);
    struct device *dev = fixture.dev;
    int fd = open(fixture.path, O_RDWR);

    assert_int_equal(write_byte(dev, 'y', 0), -EPERM);
    assert_int_equal(image_lock(fd, true), 0);
    assert_int_equal(set(dev, "readonly", "off"), -EAGAIN);
    assert_int_equal(write_byte(dev, 'y', 0), -EPERM);
    image_unlock(fd);
    assert_int_equal(image_lock(fd, false), -EAGAIN); // the locks for reading are back
    assert_int_equal(set(dev, "readonly", "off"), 0);
    assert_true(dev->durability.has_volatile_cache);
    assert_int_equal(write_byte(dev, 'y', 0), 0);
    in_file(fixture.path, 0, 'y');
    close(fd);
    teardown(&fixture);
}

static void direct_io_is_refused_where_there_is_none(void **state)
{
    char path[] = "/dev/shm/bight-unit.XXXXXX";
    int fd = mkstemp(path);
    struct device_options options = {.name = "disk",
                                     .io = "buffered",
                                     .map = "linear",
                                     .ring = ring_ops_of(state),
                                     .nr_queues = 1,
                                     .depth = 1};
    struct device *dev;
    struct err err;

    if (fd < 0)
        skip();
    assert_int_equal(ftruncate(fd, DISK), 0);
    close(fd);
    assert_int_equal(ring_create(*state, &main_ring, &err), 0);
    assert_int_equal(device_create(&dev, path, &options, &err), 0);
    assert_int_equal(set(dev, "io", "direct"), -EINVAL);
    assert_string_equal(dev->io->ops->name, "buffered");
    assert_int_equal(write_byte(dev, 'x', 0), 0);
    in_file(path, 0, 'x');
    device_stop(dev);
    workers_stop();
    ring_destroy(main_ring);
    device_destroy(dev);
    unlink(path);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_switch_leaves_the_old_image_and_goes_on_with_the_new),
        cmocka_unit_test(a_switch_that_fails_changes_nothing),
        cmocka_unit_test(what_grew_is_served_and_what_shrank_is_refused),
        cmocka_unit_test(what_was_held_back_is_held_to_the_new_size),
        cmocka_unit_test(the_io_changes_while_writes_are_in_flight),
        cmocka_unit_test(settings_that_do_not_exist_are_refused),
        cmocka_unit_test(all_settings_or_none),
        cmocka_unit_test(read_only_and_back),
        cmocka_unit_test(what_was_opened_for_reading_is_opened_for_writing),
        cmocka_unit_test(direct_io_is_refused_where_there_is_none),
    };

    return run_on_both_rings(tests);
}
