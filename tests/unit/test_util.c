#include "unit.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "util/be.h"
#include "util/iov.h"
#include "util/log.h"
#include "util/notify.h"

static void sizes_with_and_without_suffix_are_taken(void **state)
{
    static const struct {
        const char *text;
        uint64_t bytes;
    } sizes[] = {
        {"0", 0},
        {"512", 512},
        {"007", 7},
        {"1K", KiB},
        {"64k", 64 * KiB},
        {"3M", 3 * MiB},
        {"2g", 2048 * MiB},
        {"8T", 8 * MiB * MiB},
        {"9223372036854775807", INT64_MAX},
        {"8388607T", (INT64_MAX >> 40) << 40},
    };

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        uint64_t bytes = 1;

        assert_int_equal(util_parse_size(sizes[i].text, &bytes), 0);
        assert_int_equal(bytes, sizes[i].bytes);
    }
}

static void what_is_no_size_is_refused(void **state)
{
    static const char *const wrong[] = {"",    " 1", "1 ", "+1", "-1",  "1.5G", "0x10", "K",    "1KB",
                                        "1KK", "1P", "1E", "K1", "1,0", "\n",   "1e3",  "1k\n", "١"};
    static const char *const large[] = {"9223372036854775808", "18446744073709551616", "8388608T",
                                        "99999999999999999T", "9007199254740992K"};
    uint64_t bytes = 42;

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++)
        assert_int_equal(util_parse_size(wrong[i], &bytes), -EINVAL);
    for (unsigned i = 0; i < ARRAY_SIZE(large); i++)
        assert_int_equal(util_parse_size(large[i], &bytes), -ERANGE);
    assert_int_equal(bytes, 42);
}

static void counts_are_taken_within_their_range(void **state)
{
    unsigned long n = 42;

    (void)state;
    assert_int_equal(util_parse_uint("1", 1, 10, &n), 0);
    assert_int_equal(n, 1);
    assert_int_equal(util_parse_uint("10", 1, 10, &n), 0);
    assert_int_equal(n, 10);
    assert_int_equal(util_parse_uint("0", 1, 10, &n), -ERANGE);
    assert_int_equal(util_parse_uint("11", 1, 10, &n), -ERANGE);
    assert_int_equal(util_parse_uint("99999999999999999999999", 0, ULONG_MAX, &n), -ERANGE);
    assert_int_equal(util_parse_uint("", 0, 10, &n), -EINVAL);
    assert_int_equal(util_parse_uint("-1", 0, 10, &n), -EINVAL);
    assert_int_equal(util_parse_uint("+1", 0, 10, &n), -EINVAL);
    assert_int_equal(util_parse_uint(" 1", 0, 10, &n), -EINVAL);
    assert_int_equal(util_parse_uint("1 ", 0, 10, &n), -EINVAL);
    assert_int_equal(util_parse_uint("1K", 0, 10, &n), -EINVAL);
    assert_int_equal(util_parse_uint("0x1", 0, 10, &n), -EINVAL);
    assert_int_equal(n, 10);
}

static void rounding_keeps_multiples(void **state)
{
    (void)state;
    for (uint64_t align = 1; align <= 4096; align *= 2) {
        assert_true(is_power_of_2(align));
        for (uint64_t n = 0; n < 10000; n += 7) {
            assert_int_equal(round_down(n, align), n / align * align);
            assert_int_equal(round_up(n, align), (n + align - 1) / align * align);
        }
    }
    assert_false(is_power_of_2(0));
    assert_false(is_power_of_2(3));
    assert_true(is_power_of_2(1ULL << 63));
}

static void time_does_not_go_back(void **state)
{
    uint64_t last = util_now_ns();

    (void)state;
    for (unsigned i = 0; i < 1000; i++) {
        uint64_t now = util_now_ns();

        assert_true(now >= last);
        last = now;
    }
}

static void big_endian_numbers_stand_at_any_address(void **state)
{
    uint8_t bytes[16] = {0};

    (void)state;
    for (unsigned at = 0; at < 8; at++) {
        be_put64(bytes + at, 0x0123456789abcdef);
        assert_int_equal(bytes[at], 0x01);
        assert_int_equal(bytes[at + 7], 0xef);
        assert_int_equal(be_get64(bytes + at), 0x0123456789abcdef);
        assert_int_equal(be_get32(bytes + at), 0x01234567);
        assert_int_equal(be_get16(bytes + at), 0x0123);
        be_put32(bytes + at, 0xfeedc0de);
        assert_int_equal(be_get32(bytes + at), 0xfeedc0de);
        be_put16(bytes + at, 0xbeef);
        assert_int_equal(be_get16(bytes + at), 0xbeef);
        assert_int_equal(be_get32(bytes + at), 0xbeefc0de);
    }
}

// Cuts buf at random into a list, empty vectors among them.
static unsigned cut(char *buf, size_t len, struct iovec *iov, unsigned max, uint64_t *seed)
{
    unsigned n = 0;

    while (len || !n) {
        size_t piece = n == max - 1 ? len : unit_random(seed) % (len / 3 + 2);

        piece = min_of(piece, len);
        iov[n++] = (struct iovec){buf, piece};
        buf += piece;
        len -= piece;
    }
    return n;
}

static void lists_are_copied_and_zeroed_like_flat_memory(void **state)
{
    uint64_t seed = 7;

    (void)state;
    for (unsigned round = 0; round < 2000; round++) {
        size_t len = 1 + unit_random(&seed) % 300, skip = unit_random(&seed) % len;
        size_t n = unit_random(&seed) % (len - skip + 1);
        char list[300], flat[300], buf[300];
        struct iovec iov[20];

        for (size_t i = 0; i < len; i++)
            list[i] = flat[i] = (char)unit_random(&seed);
        for (size_t i = 0; i < n; i++)
            buf[i] = (char)unit_random(&seed);
        cut(list, len, iov, ARRAY_SIZE(iov), &seed);
        if (round % 3 == 0) {
            iov_from_buf(iov, skip, buf, n);
            memcpy(flat + skip, buf, n);
        } else if (round % 3 == 1) {
            iov_to_buf(iov, skip, buf, n);
            assert_memory_equal(buf, flat + skip, n);
        } else {
            iov_zero(iov, skip, n);
            memset(flat + skip, 0, n);
        }
        assert_memory_equal(list, flat, len);
    }
}

static void an_error_has_one_line_that_is_cut_rather_than_overflown(void **state)
{
    struct err err;
    char text[2000];

    (void)state;
    memset(text, 'x', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    assert_int_equal(err_set(&err, -EIO, "%s: %d", "disk", 7), -EIO);
    assert_string_equal(err.line, "disk: 7");
    assert_int_equal(err_set(&err, -EINVAL, "begin %s end", text), -EINVAL);
    assert_int_equal(strlen(err.line), sizeof(err.line) - 1);
    assert_memory_equal(err.line, "begin x", 7);
    assert_string_equal(err.line + strlen(err.line) - 5, "x end");
    err_usage(&err, "%s", "a\nb\tc\033d\177\303\244"); // names may hold anything
    assert_string_equal(err.line, "a?b?c?d?\303\244");
}

static void utf8_is_told_from_other_bytes(void **state)
{
    static const char *const good[] = {"",
                                       "disk.img",
                                       "n\303\244me",
                                       "\342\202\254",
                                       "\360\237\222\276",
                                       "\177",
                                       "\364\217\277\277",
                                       "\355\237\277\356\200\200"};
    static const char *const bad[] = {"caf\351",
                                      "\200",
                                      "\303",
                                      "\303(",
                                      "\342\202",
                                      "\342\202x",
                                      "\360\237\222",
                                      "\300\257",
                                      "\340\200\200",
                                      "\355\240\200",
                                      "\360\200\200\200",
                                      "\364\220\200\200",
                                      "\377",
                                      "x\370\210\200\200\200"};

    char text[] = "\377caf\351 n\303\244me\303\342\202\254\342\202";

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(good); i++)
        assert_true(util_is_utf8(good[i]));
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++)
        assert_false(util_is_utf8(bad[i]));
    util_make_utf8(text);
    assert_string_equal(text, "?caf? n\303\244me?\342\202\254??");
}

static int bind_datagram(const struct sockaddr_un *sun, socklen_t len)
{
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (const struct sockaddr *)sun, len), 0);
    return fd;
}

static void expect_datagram(int fd, const char *text)
{
    char buf[100];
    ssize_t n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT);

    assert_int_equal(n, strlen(text));
    assert_memory_equal(buf, text, strlen(text));
}

static void readiness_is_told_to_the_socket_named(void **state)
{
    char dir[] = "/tmp/bight-notify.XXXXXX";
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    int fd;

    (void)state;
    assert_non_null(mkdtemp(dir));
    snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/s", dir);
    fd = bind_datagram(&sun, sizeof(sun));
    setenv("NOTIFY_SOCKET", sun.sun_path, 1);
    notify_send("READY=1");
    expect_datagram(fd, "READY=1");
    notify_send("STOPPING=1");
    expect_datagram(fd, "STOPPING=1");
    close(fd);
    unlink(sun.sun_path);
    rmdir(dir);
    notify_send("READY=1"); // nobody listens any more
}

static void readiness_is_told_to_an_abstract_socket(void **state)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    char name[64];
    int fd;

    (void)state;
    snprintf(name, sizeof(name), "@bight-unit-test-%d", (int)getpid());
    memcpy(sun.sun_path + 1, name + 1, strlen(name) - 1);
    fd = bind_datagram(&sun, (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name)));
    setenv("NOTIFY_SOCKET", name, 1);
    notify_send("READY=1");
    expect_datagram(fd, "READY=1");
    close(fd);
}

static void no_socket_or_a_strange_one_is_no_error(void **state)
{
    char text[300];

    (void)state;
    memset(text, '/', sizeof(text));
    text[sizeof(text) - 1] = '\0';
    unsetenv("NOTIFY_SOCKET");
    notify_send("READY=1");
    setenv("NOTIFY_SOCKET", "", 1);
    notify_send("READY=1");
    setenv("NOTIFY_SOCKET", "relative", 1);
    notify_send("READY=1");
    setenv("NOTIFY_SOCKET", text, 1);
    notify_send("READY=1");
    unsetenv("NOTIFY_SOCKET");
}

static void sockets_passed_to_somebody_else_are_not_taken(void **state)
{
    static const char *const pids[] = {"1", "", "x", "-1", "99999999999"};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(pids); i++) {
        setenv("LISTEN_PID", pids[i], 1);
        setenv("LISTEN_FDS", "1", 1);
        setenv("LISTEN_FDNAMES", "nbd", 1);
        assert_int_equal(notify_listen_fds(), 0);
        assert_null(getenv("LISTEN_PID"));
        assert_null(getenv("LISTEN_FDS"));
        assert_null(getenv("LISTEN_FDNAMES"));
    }
}

static void a_count_of_sockets_that_makes_no_sense_is_not_taken(void **state)
{
    static const char *const counts[] = {"0", "", "x", "-1", "1025", "99999999999999999999"};
    char pid[20];

    (void)state;
    snprintf(pid, sizeof(pid), "%d", (int)getpid());
    for (unsigned i = 0; i < ARRAY_SIZE(counts); i++) {
        setenv("LISTEN_PID", pid, 1);
        setenv("LISTEN_FDS", counts[i], 1);
        assert_int_equal(notify_listen_fds(), 0);
    }
    assert_int_equal(notify_listen_fds(), 0); // without any variable
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_with_and_without_suffix_are_taken),
        cmocka_unit_test(what_is_no_size_is_refused),
        cmocka_unit_test(counts_are_taken_within_their_range),
        cmocka_unit_test(rounding_keeps_multiples),
        cmocka_unit_test(time_does_not_go_back),
        cmocka_unit_test(big_endian_numbers_stand_at_any_address),
        cmocka_unit_test(lists_are_copied_and_zeroed_like_flat_memory),
        cmocka_unit_test(an_error_has_one_line_that_is_cut_rather_than_overflown),
        cmocka_unit_test(utf8_is_told_from_other_bytes),
        cmocka_unit_test(readiness_is_told_to_the_socket_named),
        cmocka_unit_test(readiness_is_told_to_an_abstract_socket),
        cmocka_unit_test(no_socket_or_a_strange_one_is_no_error),
        cmocka_unit_test(sockets_passed_to_somebody_else_are_not_taken),
        cmocka_unit_test(a_count_of_sockets_that_makes_no_sense_is_not_taken),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
