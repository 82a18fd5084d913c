// Loop devices on a plain file: what the kernel does on a file that bight serves is for
// tests/clients/test_fuse.py.
#include "unit.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include "transport/fuse/loop.h"
#include "transport/holders.h"
#include "util/util.h"

#define FILE_BYTES (8 * MiB)

struct scratch {
    char path[40];
    char device[LOOP_DEVICE_BYTES];
};

static void make_device(struct scratch *scratch, const struct loop_options *options)
{
    struct err err = {.line = ""};
    int fd;

    if (geteuid() || access("/dev/loop-control", R_OK | W_OK) < 0)
        skip();
    strcpy(scratch->path, "/tmp/bight-loop.XXXXXX");
    fd = mkstemp(scratch->path);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, FILE_BYTES), 0);
    close(fd);
    if (loop_attach(scratch->device, scratch->path, options, &err) < 0) {
        unlink(scratch->path);
        skip();
    }
}

static uint64_t device_bytes(const char *device)
{
    int fd = open(device, O_RDONLY | O_CLOEXEC);
    uint64_t bytes = 0;

    assert_true(fd >= 0);
    assert_int_equal(ioctl(fd, BLKGETSIZE64, &bytes), 0);
    close(fd);
    return bytes;
}

static void end_device(struct scratch *scratch)
{
    struct err err = {.line = ""};

    assert_int_equal(loop_detach(scratch->device, scratch->path, false, &err), 0);
    unlink(scratch->path);
}

static void a_device_is_the_file_and_follows_its_size(void **state)
{
    struct scratch scratch;
    char path[100];
    struct err err;

    (void)state;
    make_device(&scratch, &(struct loop_options){.is_buffered = true});
    assert_int_equal(device_bytes(scratch.device), FILE_BYTES);
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), 0);
    assert_string_equal(path, scratch.path);
    assert_int_equal(truncate(scratch.path, FILE_BYTES / 2), 0);
    assert_int_equal(loop_resize(scratch.device, &err), 0);
    assert_int_equal(device_bytes(scratch.device), FILE_BYTES / 2);
    end_device(&scratch);
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), -ENXIO);
}

static void options_are_the_devices(void **state)
{
    struct scratch scratch;
    int fd, block_bytes = 0, is_read_only = 0;

    (void)state;
    make_device(&scratch,
                &(struct loop_options){.is_buffered = true, .is_read_only = true, .block_bytes = 4096});
    fd = open(scratch.device, O_RDONLY | O_CLOEXEC);
    assert_int_equal(ioctl(fd, BLKSSZGET, &block_bytes), 0);
    assert_int_equal(ioctl(fd, BLKROGET, &is_read_only), 0);
    close(fd);
    assert_int_equal(block_bytes, 4096);
    assert_int_equal(is_read_only, 1);
    end_device(&scratch);
}

static void a_device_that_is_open_is_busy_or_goes_with_its_last_close(void **state)
{
    struct scratch scratch;
    char text[200], path[100];
    struct err err = {.line = ""};
    pid_t pid;
    int pipe_fds[2];

    (void)state;
    make_device(&scratch, &(struct loop_options){.is_buffered = true});
    assert_false(holders_of_device(scratch.device, text, sizeof(text)));
    assert_string_equal(text, "");
    assert_int_equal(pipe(pipe_fds), 0);
    pid = fork();
    if (!pid) { // opens it, tells so, and waits to be told to end
        int fd = open(scratch.device, O_RDONLY);

        if (fd < 0 || write(pipe_fds[1], "x", 1) != 1)
            _exit(1);
        close(pipe_fds[1]);
        for (;;)
            pause();
    }
    assert_int_equal(read(pipe_fds[0], text, 1), 1);
    assert_true(holders_of_device(scratch.device, text, sizeof(text)));
    assert_non_null(strstr(text, "opened by "));
    assert_int_equal(loop_detach(scratch.device, scratch.path, false, &err), -EBUSY);
    assert_non_null(strstr(err.line, "opened by "));
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), 0);
    assert_int_equal(loop_detach(scratch.device, scratch.path, true, &err), 0);
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), 0); // still there
    assert_int_equal(kill(pid, SIGKILL), 0);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    for (unsigned i = 0; i < 1000 && !loop_backing_file(scratch.device, path, sizeof(path)); i++)
        usleep(10000);
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), -ENXIO);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    unlink(scratch.path);
}

static void a_device_that_is_by_now_on_another_file_stays(void **state)
{
    struct scratch scratch;
    char path[100];
    struct err err = {.line = ""};

    (void)state;
    make_device(&scratch, &(struct loop_options){.is_buffered = true});
    assert_int_equal(loop_detach(scratch.device, "/tmp/another", true, &err), 0);
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), 0);
    assert_int_equal(loop_detach(scratch.device, scratch.path, true, &err), 0);
    assert_int_equal(loop_backing_file(scratch.device, path, sizeof(path)), -ENXIO);
    unlink(scratch.path);
}

static void what_is_no_device_is_refused_in_one_line(void **state)
{
    char device[LOOP_DEVICE_BYTES], text[10];
    struct err err = {.line = ""};

    (void)state;
    assert_true(loop_attach(device, "/no/such/file", &(struct loop_options){.is_buffered = true}, &err) < 0);
    assert_non_null(strstr(err.line, "/no/such/file: No such file"));
    assert_true(loop_detach("/dev/no-such-loop", "/file", false, &err) < 0);
    assert_non_null(strstr(err.line, "/dev/no-such-loop: "));
    assert_true(loop_resize("/dev/no-such-loop", &err) < 0);
    assert_false(holders_of_device("/dev/no-such-loop", text, sizeof(text)));
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_is_the_file_and_follows_its_size),
        cmocka_unit_test(options_are_the_devices),
        cmocka_unit_test(a_device_that_is_open_is_busy_or_goes_with_its_last_close),
        cmocka_unit_test(a_device_that_is_by_now_on_another_file_stays),
        cmocka_unit_test(what_is_no_device_is_refused_in_one_line),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
