// What the commands share that ask an attached device.
#pragma once

#include <json-c/json.h>
#include <stdbool.h>

#include "util/log.h"

// Parses argv[1...] of a command whose options have no values: *operands of them follow, in argv[1...].
// flags: what may be there, such as "--json", NULL at the end; is_set: which were, in that order. 0: go on.
// Else what the command is to return, behind a minus.
int ask_parse(int argc, char **argv, const char *help, const char *const *flags, bool *is_set, int *operands);

// Exit status of a failure; err's line has been said.
int ask_failed(const struct err *err);

// Asks who is called that. request is taken over. The answer, or NULL with err set.
struct json_object *ask(const char *who, struct json_object *request, struct err *err);

// What others have named, on one line and without commands to the terminal. NULL: nothing.
void ask_put(const char *text);
// As JSON, and so as UTF-8, which a path in it need not be.
void ask_put_json(struct json_object *object);

// An answer as a table for people, or as JSON.
void ask_print(struct json_object *answer, bool is_json);

// "1.5 GiB". Into text.
const char *ask_size(char text[32], uint64_t bytes);
