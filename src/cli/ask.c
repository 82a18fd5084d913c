#include "cli/ask.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/cli.h"
#include "control/client.h"
#include "control/server.h"
#include "util/util.h"

int ask_parse(int argc, char **argv, const char *help, const char *const *flags, bool *is_set, int *operands)
{
    bool only_operands = false;
    unsigned i;

    *operands = 0;
    for (int a = 1; a < argc; a++) {
        if (only_operands || argv[a][0] != '-' || !argv[a][1]) {
            argv[++*operands] = argv[a];
            continue;
        }
        only_operands = !strcmp(argv[a], "--");
        if (only_operands)
            continue;
        if (!strcmp(argv[a], "-h") || !strcmp(argv[a], "--help")) {
            fputs(help, stdout);
            return 1;
        }
        for (i = 0; flags[i] && strcmp(flags[i], argv[a]); i++)
            ;
        if (!flags[i]) {
            log_line("%s: no such option; see bight %s --help", argv[a], argv[0]);
            return -CLI_USAGE;
        }
        is_set[i] = true;
    }
    return 0;
}

int ask_failed(const struct err *err)
{
    log_line("%s", err->line);
    return err->is_usage ? CLI_USAGE : CLI_ERROR;
}

struct json_object *ask(const char *who, struct json_object *request, struct err *err)
{
    struct json_object *answer = NULL;
    struct client client;
    struct state state;
    int ret = client_find(&state, who, err);

    if (ret < 0) {
        json_object_put(request);
        return NULL;
    }
    ret = client_open(&client, &state, err);
    if (ret < 0) {
        json_object_put(request);
    } else {
        answer = client_ask(&client, request, err);
        client_close(&client);
    }
    if (!answer && !state_is_alive(&state))
        err_set(err, -EIO, "%s: is dead: its processes were killed; bight detach %s cleans up", state.name,
                state.name);
    state_close(&state);
    return answer;
}

const char *ask_size(char text[32], uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
    double n = (double)bytes;
    unsigned i = 0;

    for (; n >= 1024 && i + 1 < ARRAY_SIZE(units); i++)
        n /= 1024;
    snprintf(text, 32, n == (double)(uint64_t)n ? "%.0f %s" : "%.1f %s", n, units[i]);
    return text;
}

void ask_put(const char *text)
{
    for (; text && *text; text++)
        putchar((unsigned char)*text < ' ' || *text == 0x7f ? '?' : *text);
}

void ask_put_json(struct json_object *object)
{
    char *text = server_text(object, JSON_C_TO_STRING_PRETTY | JSON_C_TO_STRING_NOSLASHESCAPE);

    if (text)
        puts(text);
    free(text);
}

void ask_print(struct json_object *answer, bool is_json)
{
    struct json_object_iterator at, end;

    json_object_object_del(answer, "bight");
    json_object_object_del(answer, "ok");
    if (is_json) {
        ask_put_json(answer);
        return;
    }
    at = json_object_iter_begin(answer);
    end = json_object_iter_end(answer);
    for (; !json_object_iter_equal(&at, &end); json_object_iter_next(&at)) {
        const char *key = json_object_iter_peek_name(&at);
        struct json_object *value = json_object_iter_peek_value(&at);

        if (!json_object_is_type(value, json_type_array)) {
            printf("%-22s ", key);
            ask_put(json_object_get_string(value));
            puts("");
            continue;
        }
        for (size_t i = 0; i < json_object_array_length(value); i++) { // transports
            struct json_object *transport = json_object_array_get_idx(value, i);

            printf("%-22s %s\n", client_string(transport, "transport"), client_string(transport, "uri"));
        }
    }
}
