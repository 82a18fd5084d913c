// bight resize: takes over the size that an image has now.

#include <stdio.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"

static const char resize_help[] =
    "usage: bight resize NAME\n"
    "\n"
    "Takes over the size that the image has now, after it grew or shrank. Prints it, in bytes.\n"
    "\n"
    "  -h, --help\n"
    "\n"
    "See bight-resize(1).\n";

static int resize_main(int argc, char **argv)
{
    struct json_object *answer;
    struct err err = {.line = ""};
    int nr, ret = ask_parse(argc, argv, resize_help, (const char *const[]){NULL}, NULL, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (nr != 1) {
        err_usage(&err, "resize: name one device; see bight list");
        return ask_failed(&err);
    }
    answer = ask(argv[1], client_request("resize"), &err);
    if (!answer)
        return ask_failed(&err);
    puts(client_string(answer, "size_bytes"));
    json_object_put(answer);
    return CLI_OK;
}

const struct cli_command cli_resize = {
    .name = "resize",
    .summary = "take over an image's new size",
    .help = resize_help,
    .run = resize_main,
};
