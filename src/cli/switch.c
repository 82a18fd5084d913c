// bight switch: another image behind an attached device.

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"

static const char switch_help[] =
    "usage: bight switch NAME IMAGE\n"
    "\n"
    "Puts another image of the same size behind an attached device while it is in use: what was written\n"
    "is flushed to the old one, and its users see a pause.\n"
    "\n"
    "  -h, --help\n"
    "\n"
    "See bight-switch(1).\n";

static int switch_main(int argc, char **argv)
{
    struct json_object *request, *answer;
    char image[PATH_MAX];
    struct err err = {.line = ""};
    int nr, ret = ask_parse(argc, argv, switch_help, (const char *const[]){NULL}, NULL, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (nr != 2)
        err_usage(&err, "switch: name a device and an image; see bight switch --help");
    else if (!realpath(argv[2], image))
        err_set(&err, -errno, "%s: %s", argv[2], strerror(errno));
    if (err.line[0])
        return ask_failed(&err);
    request = client_request("switch");
    json_object_object_add(request, "image", json_object_new_string(image));
    answer = ask(argv[1], request, &err);
    json_object_put(answer);
    return answer ? CLI_OK : ask_failed(&err);
}

const struct cli_command cli_switch = {
    .name = "switch",
    .summary = "put another image behind an attached device",
    .help = switch_help,
    .run = switch_main,
};
