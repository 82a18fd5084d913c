// bight show: one attached device.

#include <stdio.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"

static const char show_help[] =
    "usage: bight show [--json] NAME\n"
    "\n"
    "Shows an attached device: its image, sizes, transports, settings and state. NAME is its name, its\n"
    "device or URI, or its image.\n"
    "\n"
    "  --json               for programs\n"
    "  -h, --help\n"
    "\n"
    "See bight-show(1).\n";

static int show_main(int argc, char **argv)
{
    struct json_object *object;
    struct err err = {.line = ""};
    struct state state;
    bool is_json = false;
    int nr, ret = ask_parse(argc, argv, show_help, (const char *const[]){"--json", NULL}, &is_json, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (nr != 1) {
        err_usage(&err, "show: name one device; see bight list");
        return ask_failed(&err);
    }
    if (client_find(&state, argv[1], &err) < 0)
        return ask_failed(&err);
    object = client_describe(&state, &err); // also of the dead
    state_close(&state);
    if (!object)
        return ask_failed(&err);
    ask_print(object, is_json);
    json_object_put(object);
    return CLI_OK;
}

const struct cli_command cli_show = {
    .name = "show",
    .summary = "show an attached device",
    .help = show_help,
    .run = show_main,
};
