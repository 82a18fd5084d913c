// bight set: settings of an attached device.

#include <string.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"

static const char set_help[] =
    "usage: bight set NAME KEY=VALUE...\n"
    "\n"
    "Changes settings while the device is in use: all of them, or none. Its users see a pause.\n"
    "\n"
    "  readonly=on|off      refuse every write, or take them again\n"
    "  io=IO                direct, buffered, or fault:SPEC\n"
    "  map=MAP              linear or fastfs\n"
    "  writeback=SIZE       cache writes and allocate late: on, off, or a size\n"
    "  -h, --help\n"
    "\n"
    "See bight-set(1).\n";

static int set_main(int argc, char **argv)
{
    struct json_object *request, *settings, *answer;
    struct err err = {.line = ""};
    int nr, ret = ask_parse(argc, argv, set_help, (const char *const[]){NULL}, NULL, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (nr < 2) {
        err_usage(&err, "set: name a device and what to set; see bight set --help");
        return ask_failed(&err);
    }
    request = client_request("set");
    settings = json_object_new_object();
    json_object_object_add(request, "settings", settings);
    for (int i = 2; i <= nr; i++) {
        char *value = strchr(argv[i], '=');

        if (!value) {
            err_usage(&err, "set: %s: no KEY=VALUE; see bight set --help", argv[i]);
            json_object_put(request);
            return ask_failed(&err);
        }
        *value++ = '\0';
        json_object_object_add(settings, argv[i], json_object_new_string(value));
    }
    answer = ask(argv[1], request, &err);
    json_object_put(answer);
    return answer ? CLI_OK : ask_failed(&err);
}

const struct cli_command cli_set = {
    .name = "set",
    .summary = "change settings of an attached device",
    .help = set_help,
    .run = set_main,
};
