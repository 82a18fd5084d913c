// bight list: every attached device.

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "control/client.h"
#include "util/util.h"

static const char list_help[] = "usage: bight list [--json]\n"
                                "\n"
                                "Lists the attached devices, those that failed or died included.\n"
                                "\n"
                                "  --json               for programs\n"
                                "  -h, --help\n"
                                "\n"
                                "See bight-list(1).\n";

static void list_add(const char *name, void *arg)
{
    struct json_object *list = arg, *object;
    struct state state;
    struct err err;

    if (state_open(&state, name, &err) < 0)
        return; // gone meanwhile
    object = client_describe(&state, &err);
    state_close(&state);
    if (!object)
        return;
    json_object_object_del(object, "bight");
    json_object_object_del(object, "ok");
    json_object_array_add(list, object);
}

#define LIST_COLUMNS 5

static void list_print_row(const char *const cells[LIST_COLUMNS], const size_t widths[LIST_COLUMNS])
{
    for (unsigned c = 0; c + 1 < LIST_COLUMNS; c++) {
        const char *cell = *cells[c] ? cells[c] : "-";

        ask_put(cell);
        printf("%*s", (int)(widths[c] - min_of(widths[c], strlen(cell))) + 2, "");
    }
    ask_put(*cells[LIST_COLUMNS - 1] ? cells[LIST_COLUMNS - 1] : "-");
    puts("");
}

static void list_print(struct json_object *list)
{
    static const char *const keys[LIST_COLUMNS] = {"name", "state", "size", "device", "image"};
    static const char *const heads[LIST_COLUMNS] = {"NAME", "STATE", "SIZE", "DEVICE", "IMAGE"};
    const char *cells[LIST_COLUMNS];
    size_t widths[LIST_COLUMNS], nr = json_object_array_length(list);

    for (size_t i = 0; i < nr; i++) {
        struct json_object *object = json_object_array_get_idx(list, i), *size;
        char text[32];

        if (json_object_object_get_ex(object, "size_bytes", &size))
            json_object_object_add(object, "size",
                                   json_object_new_string(ask_size(text, json_object_get_uint64(size))));
    }
    for (unsigned c = 0; c < LIST_COLUMNS; c++) {
        widths[c] = strlen(heads[c]);
        for (size_t i = 0; i < nr; i++)
            widths[c] = max_of(widths[c], strlen(client_string(json_object_array_get_idx(list, i), keys[c])));
    }
    if (nr)
        list_print_row(heads, widths);
    for (size_t i = 0; i < nr; i++) {
        struct json_object *object = json_object_array_get_idx(list, i);

        for (unsigned c = 0; c < LIST_COLUMNS; c++)
            cells[c] = client_string(object, keys[c]);
        list_print_row(cells, widths);
        if (*client_string(object, "reason") && strcmp(client_string(object, "state"), "running"))
            printf("%*s  %s\n", (int)widths[0], "", client_string(object, "reason"));
    }
}

static int list_main(int argc, char **argv)
{
    struct json_object *list;
    struct err err = {.line = ""};
    bool is_json = false;
    int nr, ret = ask_parse(argc, argv, list_help, (const char *const[]){"--json", NULL}, &is_json, &nr);

    if (ret)
        return ret < 0 ? -ret : CLI_OK;
    if (nr) {
        err_usage(&err, "list: %s: takes no name; use bight show %s", argv[1], argv[1]);
        return ask_failed(&err);
    }
    list = json_object_new_array();
    ret = state_each(list_add, list, &err);
    if (ret < 0)
        ask_failed(&err);
    else if (is_json)
        ask_put_json(list);
    else
        list_print(list);
    json_object_put(list);
    return ret < 0 ? CLI_ERROR : CLI_OK;
}

const struct cli_command cli_list = {
    .name = "list",
    .summary = "list the attached devices",
    .help = list_help,
    .run = list_main,
};
