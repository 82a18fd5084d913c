// bight detach: ends attached devices, and cleans up after dead ones.

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/clean.h"
#include "control/client.h"
#include "util/util.h"

static const char detach_help[] =
    "usage: bight detach [OPTIONS] NAME...\n"
    "       bight detach [OPTIONS] --all\n"
    "\n"
    "Ends an attached device: what was written is flushed, and nothing is left of it. NAME is its name, its\n"
    "device or URI, or its image. Refused while somebody uses it. What a dead device has left is cleaned "
    "up.\n"
    "\n"
    "  --all                every attached device\n"
    "  --lazy               when its last user is done, without waiting for that\n"
    "  --force              also while it is in use: its users get errors; also when it does not answer\n"
    "  -h, --help\n"
    "\n"
    "See bight-detach(1).\n";

#define HUNG_SEC 10 // without a word, when it is to end by force
#define KILL_SEC 5
#define KILL_PAUSE_US 10000

enum { FLAG_ALL, FLAG_LAZY, FLAG_FORCE, FLAG_NR };

static bool wait_dead(const struct state *state, unsigned seconds)
{
    for (unsigned i = 0; i < seconds * 1000000 / KILL_PAUSE_US; i++) {
        if (state_take_dead(state))
            return true;
        usleep(KILL_PAUSE_US);
    }
    return false;
}

// 0, or a negative errno with err set: -EBUSY when that is its own answer.
static int detach_alive(const struct state *state, const bool flags[FLAG_NR], struct err *err)
{
    struct json_object *request, *answer;
    struct client client;
    int ret = client_open(&client, state, err);

    if (ret < 0)
        return ret;
    request = client_request("detach");
    json_object_object_add(request, "lazy", json_object_new_boolean(flags[FLAG_LAZY]));
    json_object_object_add(request, "force", json_object_new_boolean(flags[FLAG_FORCE]));
    answer = client_ask(&client, request, err);
    ret = answer ? 0 : client.has_answered ? -EBUSY : client.has_timed_out ? -ETIMEDOUT : -ECONNRESET;
    if (client.has_ended && !flags[FLAG_FORCE]) // with an error or without; a lazy one may have to wait
        state_wait_dead(state);
    else if (client.has_ended && !wait_dead(state, HUNG_SEC))
        ret = -ETIMEDOUT; // the supervisor hangs
    client_close(&client);
    json_object_put(answer);
    return ret;
}

// "show" waits for nothing.
static bool is_hung(const struct state *state)
{
    struct err err = {.line = ""};
    struct client client;
    bool has_timed_out;

    if (client_open(&client, state, &err) < 0)
        return false;
    client_set_patience(&client, HUNG_SEC);
    json_object_put(client_ask(&client, client_request("show"), &err));
    has_timed_out = client.has_timed_out;
    client_close(&client);
    return has_timed_out;
}

// A process of the device that the state file names, if it is one still.
static void kill_ours(const struct state *state, struct json_object *object, const char *key, int signal)
{
    pid_t pid = (pid_t)json_object_get_int(json_object_object_get(object, key));
    char path[64], name[32] = "", title[32];
    FILE *file;

    if (pid <= 1)
        return;
    snprintf(path, sizeof(path), "/proc/%d/comm", (int)pid);
    snprintf(title, sizeof(title), "bight:%.9s\n", state->name); // supervisor_run() says so
    file = fopen(path, "re");
    if (!file)
        return;
    if (fgets(name, sizeof(name), file) && !strcmp(name, title))
        kill(pid, signal);
    fclose(file);
}

// The supervisor ends its worker and lets go of what it holds; without one, or if it hangs as well, we do.
static int detach_killed(struct state *state, struct err *err)
{
    char *text = state_read(state, "state");
    struct json_object *object = text ? json_tokener_parse(text) : NULL;
    bool is_dead;

    free(text);
    kill_ours(state, object, "pid", SIGQUIT);
    is_dead = wait_dead(state, KILL_SEC);
    if (!is_dead) {
        kill_ours(state, object, "pid", SIGKILL);
        kill_ours(state, object, "worker_pid", SIGKILL);
        is_dead = wait_dead(state, KILL_SEC);
    }
    json_object_put(object);
    if (!is_dead)
        return err_set(err, -EBUSY,
                       "%s: hangs, and was killed, but does not end: its image's disk may not answer",
                       state->name);
    clean_dead(state, err);
    return err_set(err, -EIO, "%s: did not answer, and was killed; what was written last may be lost",
                   state->name);
}

static int detach_one(struct state *state, const bool flags[FLAG_NR], struct err *err)
{
    int ret;

    if (state_take_dead(state))
        return clean_dead(state, err);
    if (flags[FLAG_FORCE] && is_hung(state))
        return detach_killed(state, err);
    ret = detach_alive(state, flags, err);
    if (ret == -ETIMEDOUT && flags[FLAG_FORCE])
        return detach_killed(state, err);
    // It has died meanwhile, or was about to. What it has answered stands.
    if (ret < 0 && ret != -EBUSY && state_take_dead(state))
        return clean_dead(state, err);
    return ret;
}

struct detach_all {
    const bool *flags;
    int status;
};

static void detach_each(const char *name, void *arg)
{
    struct detach_all *all = arg;
    struct err err = {.line = ""};
    struct state state;

    if (state_open(&state, name, &err) < 0)
        return; // gone meanwhile
    if (detach_one(&state, all->flags, &err) < 0)
        all->status = ask_failed(&err);
    state_close(&state);
}

static int detach_main(int argc, char **argv)
{
    static const char *const names[] = {"--all", "--lazy", "--force", NULL};
    bool flags[FLAG_NR] = {false};
    struct detach_all all = {.flags = flags, .status = CLI_OK};
    struct err err = {.line = ""};
    int nr, ret = ask_parse(argc, argv, detach_help, names, flags, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (flags[FLAG_ALL] == (nr > 0)) {
        err_usage(&err, "detach: name devices, or use --all; see bight list");
        return ask_failed(&err);
    }
    if (flags[FLAG_ALL] && state_each(detach_each, &all, &err) < 0)
        return ask_failed(&err);
    for (int i = 1; i <= nr; i++) {
        struct state state;

        ret = client_find(&state, argv[i], &err);
        if (!ret) {
            ret = detach_one(&state, flags, &err);
            state_close(&state);
        }
        if (ret < 0)
            all.status = ask_failed(&err);
    }
    return all.status;
}

const struct cli_command cli_detach = {
    .name = "detach",
    .summary = "end an attached device",
    .help = detach_help,
    .run = detach_main,
};
