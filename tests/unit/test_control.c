// What the control plane makes of names and of bytes from outside.
#include "unit.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/server.h"
#include "control/state.h"

static struct err err;

static void names_are_made_of_images(void **state)
{
    static const char *const pairs[][2] = {
        {"/a/disk.img", "disk"}, {"/disk", "disk"}, {"/a.b/c.d.raw", "c.d"},
        {"/.hidden", "_hidden"}, {"/-x.img", "_x"}, {"/a b\xc3\xa4.img", "a_b__"},
        {"/dev/sda1", "sda1"},   {"/a/", "image"},
    };
    char name[STATE_NAME_MAX + 1], long_path[300] = "/";

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(pairs); i++) {
        state_name_of(pairs[i][0], name);
        assert_string_equal(name, pairs[i][1]);
        assert_true(state_is_name(name));
    }
    memset(long_path + 1, 'x', 250);
    state_name_of(long_path, name);
    assert_true(state_is_name(name) && strlen(name) < STATE_NAME_MAX);
}

static void what_is_no_name_is_refused(void **state)
{
    static const char *const wrong[] = {"", ".", "..", ".a", "-a", "a/b", "a b", "a\n", "\xc3\xa4", "a:b"};
    char name[STATE_NAME_MAX + 2];

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(wrong); i++)
        assert_false(state_is_name(wrong[i]));
    memset(name, 'a', sizeof(name));
    name[STATE_NAME_MAX + 1] = '\0';
    assert_false(state_is_name(name));
    name[STATE_NAME_MAX] = '\0';
    assert_true(state_is_name(name));
}

static void count(const char *name, void *arg)
{
    (void)name;
    ++*(unsigned *)arg;
}

static void a_directory_is_its_holders_until_it_ends(void **state)
{
    char base[] = "/tmp/bight-unit.XXXXXX";
    struct state first, second, seen;
    unsigned nr = 0;
    char *text;

    (void)state;
    assert_non_null(mkdtemp(base));
    setenv("BIGHT_RUN_DIR", base, 1);
    assert_int_equal(state_claim(&first, "disk", false, &err), 0);
    assert_int_equal(state_claim(&second, "disk", false, &err), 0);
    assert_string_equal(second.name, "disk-2");
    assert_int_equal(state_claim(&seen, "disk", true, &err), -EEXIST);
    assert_int_equal(state_open(&seen, "disk", &err), 0);
    assert_true(state_is_alive(&seen));
    assert_false(state_take_dead(&seen));
    assert_int_equal(state_write(&first, "command", "{}"), 0);
    assert_int_equal(state_write(&first, "state", "{}"), 0);
    text = state_read(&seen, "state");
    assert_string_equal(text, "{}");
    free(text);
    assert_null(state_read(&seen, "nothing"));
    state_close(&first); // as when the process dies
    assert_false(state_is_alive(&seen));
    assert_true(state_take_dead(&seen));
    assert_int_equal(state_each(count, &nr, &err), 0);
    assert_int_equal(nr, 2);
    state_remove(&seen);
    state_close(&seen);
    assert_int_equal(state_open(&seen, "disk", &err), -ENOENT);
    assert_int_equal(state_open(&seen, "../disk", &err), -ENOENT);
    state_remove(&second);
    state_close(&second);
    assert_int_equal(rmdir(base), 0);
}

static void directories_of_others_are_left_alone(void **state)
{
    char base[] = "/tmp/bight-unit.XXXXXX", path[100];
    struct state seen;
    unsigned nr = 0;

    (void)state;
    assert_non_null(mkdtemp(base));
    setenv("BIGHT_RUN_DIR", base, 1);
    snprintf(path, sizeof(path), "%s/theirs", base);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(state_open(&seen, "theirs", &err), 0);
    assert_int_equal(state_write(&seen, "log", "precious"), 0);
    assert_int_equal(state_each(count, &nr, &err), 0);
    assert_int_equal(nr, 0);
    state_remove(&seen);
    assert_int_equal(faccessat(seen.fd, "log", F_OK, 0), 0);
    assert_int_equal(unlinkat(seen.fd, "log", 0), 0);
    state_close(&seen);
    assert_int_equal(rmdir(path), 0);
    assert_int_equal(rmdir(base), 0);
}

static bool parses(const char *line)
{
    struct json_object *request;

    err = (struct err){.line = ""};
    request = server_parse(line, strlen(line), &err);
    json_object_put(request);
    assert_true(!request == !!err.line[0]);
    return request;
}

static void a_request_is_one_object_of_our_version(void **state)
{
    char deep[200] = "{\"bight\":1,\"a\":";

    (void)state;
    assert_true(parses("{\"bight\":1,\"verb\":\"show\"}"));
    assert_true(parses(" {\"bight\":1} "));
    assert_false(parses(""));
    assert_false(parses("{"));
    assert_false(parses("[]"));
    assert_false(parses("null"));
    assert_false(parses("{}"));
    assert_false(parses("{\"bight\":2}"));
    assert_false(parses("{\"bight\":1} x"));
    assert_false(parses("{\"bight\":1}{\"bight\":1}"));
    assert_true(parses("{\"bight\":1,\"a\":\"\xff\"}")); // a path may be of any bytes
    memset(deep + strlen(deep), '[', 50);
    assert_false(parses(deep));
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_made_of_images),
        cmocka_unit_test(what_is_no_name_is_refused),
        cmocka_unit_test(a_directory_is_its_holders_until_it_ends),
        cmocka_unit_test(directories_of_others_are_left_alone),
        cmocka_unit_test(a_request_is_one_object_of_our_version),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
