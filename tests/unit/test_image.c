#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image/image.h"

static char dir[64], path[80];

static int make_scratch(void **state)
{
    (void)state;
    fixture_make_dir(dir);
    snprintf(path, sizeof(path), "%s/disk", dir);
    fixture_make_file(path, 100001);
    return 0;
}

static int remove_scratch(void **state)
{
    (void)state;
    unlink(path);
    rmdir(dir);
    return 0;
}

static void put(const void *data, size_t len, off_t at)
{
    int fd = open(path, O_WRONLY);

    assert_int_equal(pwrite(fd, data, len, at), len);
    close(fd);
}

static const struct format {
    const char *name;
    unsigned at, len;
    const char *magic;
} formats[] = {
    {"qcow2", 0, 4, "QFI\xfb"},
    {"qed", 0, 4, "QED\0"},
    {"vmdk", 0, 4, "KDMV"},
    {"vmdk", 0, 4, "COWD"},
    {"vmdk", 0, 21, "# Disk DescriptorFile"},
    {"vhdx", 0, 8, "vhdxfile"},
    {"vpc", 0, 8, "conectix"},
    {"vdi", 64, 4, "\x7f\x10\xda\xbe"},
    {"parallels", 0, 16, "WithoutFreeSpace"},
    {"parallels", 0, 16, "WithouFreSpacExt"},
    {"luks", 0, 6, "LUKS\xba\xbe"},
};

static void every_format_is_known_by_its_first_bytes(void **state)
{
    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(formats); i++) {
        const struct format *format = &formats[i];
        char head[512] = "";

        memcpy(head + format->at, format->magic, format->len);
        assert_string_equal(image_looks_like(head, sizeof(head)), format->name);
        assert_string_equal(image_looks_like(head, format->at + format->len), format->name);
        assert_null(image_looks_like(head, format->at + format->len - 1));
        assert_null(image_looks_like(head + 1, sizeof(head) - 1));
        head[format->at] ^= 1;
        assert_null(image_looks_like(head, sizeof(head)));
    }
}

static void plain_disks_look_like_nothing_else(void **state)
{
    char head[512] = "";

    (void)state;
    assert_null(image_looks_like(head, 0));
    assert_null(image_looks_like(head, sizeof(head)));
    head[510] = 0x55; // a partition table
    head[511] = (char)0xaa;
    assert_null(image_looks_like(head, sizeof(head)));
    memset(head, 0xff, sizeof(head));
    assert_null(image_looks_like(head, sizeof(head)));
}

static int open_with(struct image *image, const struct image_options *options, struct err *err)
{
    *err = (struct err){""};
    return image_open(image, path, options, err);
}

static void an_image_of_another_format_is_refused_unless_it_is_said_to_be_raw(void **state)
{
    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(formats); i++) {
        char zeroes[512] = "";
        struct image image;
        struct err err;

        put(zeroes, sizeof(zeroes), 0);
        put(formats[i].magic, formats[i].len, formats[i].at);
        assert_int_equal(open_with(&image, &(struct image_options){.want_direct = true}, &err), -EINVAL);
        assert_non_null(strstr(err.line, formats[i].name));
        assert_non_null(strstr(err.line, "--format raw"));
        assert_int_equal(open_with(&image, &(struct image_options){.is_format_raw = true}, &err), 0);
        image_close(&image);
        put(zeroes, sizeof(zeroes), 0);
        assert_int_equal(open_with(&image, &(struct image_options){0}, &err), 0);
        image_close(&image);
    }
}

static void offset_and_limit_cut_the_device_out_of_the_image(void **state)
{
    static const struct {
        uint64_t offset, limit, size;
    } cuts[] = {
        {0, 0, 100001},      {1, 0, 100000},
        {100000, 0, 1},      {100001, 0, 0},
        {0, 1, 1},           {0, 100001, 100001},
        {0, 200000, 100001}, {5000, 4096, 4096},
        {100000, 4096, 1},   {50000, INT64_MAX, 50001},
    };

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(cuts); i++) {
        struct image_options options = {.offset_bytes = cuts[i].offset, .size_limit_bytes = cuts[i].limit};
        struct image image;
        struct err err;

        assert_int_equal(open_with(&image, &options, &err), 0);
        assert_int_equal(image.size_bytes, cuts[i].size);
        assert_int_equal(image.offset_bytes, cuts[i].offset);
        assert_int_equal(image.file_bytes, 100001);
        image_close(&image);
    }
}

static void an_offset_behind_the_end_is_refused(void **state)
{
    static const uint64_t offsets[] = {100002, INT64_MAX};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(offsets); i++) {
        struct image image;
        struct err err;

        assert_int_equal(open_with(&image, &(struct image_options){.offset_bytes = offsets[i]}, &err),
                         -EINVAL);
        assert_non_null(strstr(err.line, "--offset"));
    }
}

static void alignment_is_a_power_of_two_and_one_when_buffered(void **state)
{
    struct image image;
    struct err err;

    (void)state;
    assert_int_equal(open_with(&image, &(struct image_options){0}, &err), 0);
    assert_int_equal(image.dio_offset_align, 1);
    assert_int_equal(image.dio_mem_align, 1);
    assert_false(image.is_direct);
    assert_int_equal(image.buffered_fd, -1);
    image_close(&image);
    assert_int_equal(open_with(&image, &(struct image_options){.want_direct = true}, &err), 0);
    assert_true(is_power_of_2(image.dio_offset_align));
    assert_true(is_power_of_2(image.dio_mem_align));
    assert_int_equal(image.is_direct, image.dio_offset_align > 1);
    assert_int_equal(image.buffered_fd >= 0, image.is_direct); // the last block is a partial one
    image_close(&image);
}

static void a_closed_image_is_closed_once(void **state)
{
    struct image image;
    struct err err;

    (void)state;
    assert_int_equal(open_with(&image, &(struct image_options){0}, &err), 0);
    image_close(&image);
    assert_int_equal(image.fd, -1);
    assert_null(image.path);
    image_close(&image);
}

// Opens it twice: does the second one get it?
static bool both_get_it(bool is_first_read_only, bool is_second_read_only)
{
    struct image first, second;
    struct err err;
    int ret;

    assert_int_equal(open_with(&first, &(struct image_options){.is_read_only = is_first_read_only}, &err), 0);
    ret = open_with(&second, &(struct image_options){.is_read_only = is_second_read_only}, &err);
    if (!ret) {
        image_close(&second);
    } else {
        assert_int_equal(ret, -EAGAIN);
        assert_non_null(strstr(err.line, "has it open for writing"));
        assert_null(strchr(err.line, '\n'));
    }
    image_close(&first);
    return !ret;
}

static void a_writer_is_alone(void **state)
{
    (void)state;
    assert_false(both_get_it(false, false));
    assert_false(both_get_it(false, true));
    assert_false(both_get_it(true, false));
}

static void readers_share_the_image(void **state)
{
    (void)state;
    assert_true(both_get_it(true, true));
}

static void the_locks_go_with_the_image(void **state)
{
    struct image image;
    struct err err;

    (void)state;
    for (unsigned i = 0; i < 4; i++) {
        assert_int_equal(open_with(&image, &(struct image_options){.is_read_only = i % 2}, &err), 0);
        image_close(&image);
    }
}

static void the_locks_are_the_bytes_that_qemu_uses(void **state)
{
    static const off_t used[] = {100, 101}, unshared[] = {201, 203},
                       free_ones[] = {99, 102, 103, 104, 200, 202, 204};
    struct image image;
    struct err err;
    int fd = open(path, O_RDWR);
    const struct {
        const off_t *at;
        unsigned nr;
        bool is_locked;
    } sets[] = {{used, ARRAY_SIZE(used), true},
                {unshared, ARRAY_SIZE(unshared), true},
                {free_ones, ARRAY_SIZE(free_ones), false}};

    (void)state;
    assert_int_equal(open_with(&image, &(struct image_options){0}, &err), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(sets); i++) {
        for (unsigned j = 0; j < sets[i].nr; j++) {
            struct flock lock = {.l_type = F_WRLCK,
                                 .l_whence = SEEK_SET,
                                 .l_start = sets[i].at[j],
                                 .l_len = 1};

            assert_int_equal(fcntl(fd, F_OFD_GETLK, &lock), 0);
            assert_int_equal(lock.l_type != F_UNLCK, sets[i].is_locked);
        }
    }
    image_close(&image);
    close(fd);
}

static void only_files_and_block_devices_are_taken(void **state)
{
    char fifo[90];
    struct image image;
    struct err err;

    (void)state;
    snprintf(fifo, sizeof(fifo), "%s/fifo", dir);
    assert_int_equal(mkfifo(fifo, 0600), 0);
    assert_int_equal(image_open(&image, fifo, &(struct image_options){0}, &err),
                     -EINVAL); // and does not hang
    assert_int_equal(image_open(&image, dir, &(struct image_options){0}, &err), -EINVAL);
    assert_non_null(strstr(err.line, "directory"));
    assert_int_equal(image_open(&image, "/dev/zero", &(struct image_options){0}, &err), -EINVAL);
    unlink(fifo);
    assert_int_equal(image_open(&image, fifo, &(struct image_options){0}, &err), -ENOENT);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_format_is_known_by_its_first_bytes),
        cmocka_unit_test(plain_disks_look_like_nothing_else),
        cmocka_unit_test(an_image_of_another_format_is_refused_unless_it_is_said_to_be_raw),
        cmocka_unit_test(offset_and_limit_cut_the_device_out_of_the_image),
        cmocka_unit_test(an_offset_behind_the_end_is_refused),
        cmocka_unit_test(alignment_is_a_power_of_two_and_one_when_buffered),
        cmocka_unit_test(a_closed_image_is_closed_once),
        cmocka_unit_test(a_writer_is_alone),
        cmocka_unit_test(readers_share_the_image),
        cmocka_unit_test(the_locks_go_with_the_image),
        cmocka_unit_test(the_locks_are_the_bytes_that_qemu_uses),
        cmocka_unit_test(only_files_and_block_devices_are_taken),
    };

    return cmocka_run_group_tests(tests, make_scratch, remove_scratch);
}
