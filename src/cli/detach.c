// bight detach: ends attached devices, and cleans up after dead ones.

#include <errno.h>
#include <stdlib.h>
#include <string.h>

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
    "  --force              also while it is in use: its users get errors\n"
    "  -h, --help\n"
    "\n"
    "See bight-detach(1).\n";

enum { FLAG_ALL, FLAG_LAZY, FLAG_FORCE, FLAG_NR };

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
    if (client.has_ended) // with an error or without; a lazy one may have to wait
        state_wait_dead(state);
    ret = answer ? 0 : client.has_answered ? -EBUSY : -ECONNRESET;
    client_close(&client);
    json_object_put(answer);
    return ret;
}

static int detach_one(struct state *state, const bool flags[FLAG_NR], struct err *err)
{
    int ret;

    if (state_take_dead(state))
        return clean_dead(state, err);
    ret = detach_alive(state, flags, err);
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
