// bight recover: new processes for block devices whose own were killed, supervisor and all.

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"
#include "util/util.h"

static const char recover_help[] = "usage: bight recover [NAME...]\n"
                                   "\n"
                                   "Starts block devices (--ublk) again whose processes were killed: those "
                                   "named, or all. Who uses them has\n"
                                   "been waiting, and goes on. What else is dead, bight detach cleans up.\n"
                                   "\n"
                                   "  -h, --help\n"
                                   "\n"
                                   "See bight-recover(1).\n";

// A file of the state's, parsed, or NULL.
static struct json_object *recover_read(const struct state *state, const char *file)
{
    char *text = state_read(state, file);
    struct json_object *object = text ? json_tokener_parse(text) : NULL;

    free(text);
    return object;
}

// The transports of the state file that are ublk's; their "uri" is "/dev/ublkbID".
static unsigned recover_devices(struct json_object *object, const char **uris, unsigned max)
{
    struct json_object *transports;
    unsigned nr = 0;

    if (!json_object_object_get_ex(object, "transports", &transports) ||
        !json_object_is_type(transports, json_type_array))
        return 0;
    for (size_t i = 0; i < json_object_array_length(transports) && nr < max; i++) {
        struct json_object *transport = json_object_array_get_idx(transports, i);

        if (!strcmp(client_string(transport, "transport"), "ublk"))
            uris[nr++] = client_string(transport, "uri");
    }
    return nr;
}

// "bight attach" as it was called, for exactly this name and these devices.
static int recover_exec(const char *name, struct json_object *command, const char *const *uris, unsigned nr)
{
    struct json_object *argv = NULL;
    size_t argc = json_object_object_get_ex(command, "argv", &argv) ? json_object_array_length(argv) : 0;
    char **args = calloc(argc + nr + 6, sizeof(*args));
    unsigned n = 0;

    if (!args || !argc)
        return CLI_ERROR;
    args[n++] = (char *)"bight";
    args[n++] = (char *)"attach";
    args[n++] = (char *)"--name";
    args[n++] = (char *)name;
    for (unsigned i = 0; i < nr; i++) {
        if (asprintf(&args[n++], "--ublk=%s", uris[i] + strcspn(uris[i], "0123456789")) < 0)
            return CLI_ERROR;
    }
    for (size_t i = 1; i < argc; i++) {
        const char *arg = json_object_get_string(json_object_array_get_idx(argv, i));

        if (!strcmp(arg, "--name"))
            i++;
        else if (strncmp(arg, "--name=", 7) && strncmp(arg, "--ublk", 6))
            args[n++] = (char *)arg;
    }
    if (chdir(client_string(command, "cwd")) < 0)
        log_verbose("%s: %s", client_string(command, "cwd"), strerror(errno));
    execv("/proc/self/exe", args);
    log_line("recover: %s: %s", name, strerror(errno));
    return CLI_ERROR;
}

static int recover_one(struct state *state)
{
    struct json_object *object = recover_read(state, "state"), *command = recover_read(state, "command");
    const char *uris[16];
    unsigned nr = recover_devices(object, uris, ARRAY_SIZE(uris));
    struct err err;
    int status = 0;
    pid_t pid;

    if (!nr || !command) {
        err_set(&err, -EINVAL, "recover: %s: no block device waits; clean up by bight detach %s", state->name,
                state->name);
        status = ask_failed(&err);
        goto out;
    }
    state_remove(state);
    pid = fork();
    if (!pid) {
        state_close(state);
        exit(recover_exec(state->name, command, uris, nr));
    }
    if (pid < 0 || waitpid(pid, &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status)) {
        err_set(&err, -EIO, "recover: %s: not started; %s still waits for bight attach --ublk=%s",
                state->name, uris[0], uris[0] + strcspn(uris[0], "0123456789"));
        status = ask_failed(&err);
    }
out:
    json_object_put(object);
    json_object_put(command);
    return status;
}

static void recover_each(const char *name, void *arg)
{
    struct json_object *object;
    const char *uri;
    struct state state;
    int *status = arg;

    if (state_open(&state, name, &(struct err){.line = ""}) < 0)
        return; // gone meanwhile
    object = recover_read(&state, "state");
    if (recover_devices(object, &uri, 1) && state_take_dead(&state))
        *status |= recover_one(&state);
    json_object_put(object);
    state_close(&state);
}

static int recover_main(int argc, char **argv)
{
    struct err err = {.line = ""};
    int nr, status = CLI_OK,
            ret = ask_parse(argc, argv, recover_help, (const char *const[]){NULL}, NULL, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (!nr && state_each(recover_each, &status, &err) < 0)
        return ask_failed(&err);
    for (int i = 1; i <= nr; i++) {
        struct state state;

        ret = client_find(&state, argv[i], &err);
        if (!ret && !state_take_dead(&state))
            ret = err_set(&err, -EBUSY, "recover: %s: is alive; see bight show %s", argv[i], argv[i]);
        if (ret < 0)
            status = ask_failed(&err);
        else
            status |= recover_one(&state);
        if (!ret || ret == -EBUSY)
            state_close(&state);
    }
    return status;
}

const struct cli_command cli_recover = {
    .name = "recover",
    .summary = "start block devices again whose processes were killed",
    .help = recover_help,
    .run = recover_main,
};
