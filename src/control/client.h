// Asking an attached device. Blocking; for commands.
#pragma once

#include <json-c/json.h>

#include "control/state.h"

struct client {
    int fd;
    char *in;
    size_t in_len;
    bool has_answered;  // if only that it refuses
    bool has_ended;     // and that was its last word
    bool has_timed_out; // it has neither answered nor closed
};

// -ECONNREFUSED: nobody answers there. 0, or a negative errno with err set.
int client_open(struct client *client, const struct state *state, struct err *err);
void client_close(struct client *client);

// How long client_ask() waits from now on.
void client_set_patience(struct client *client, unsigned seconds);

// request: an object with a verb, taken over. The answer, or NULL with err set: it was refused, or none
// came.
struct json_object *client_ask(struct client *client, struct json_object *request, struct err *err);

// The directory of who is meant: a name, a device or URI, or an image. 0, or a negative errno with err
// set.
int client_find(struct state *state, const char *text, struct err *err);

// {"verb": verb}
struct json_object *client_request(const char *verb);

// What is known of a device: what it answers to "show", or else its state file with a "state" of "dead".
// NULL with err set: it is gone.
struct json_object *client_describe(const struct state *state, struct err *err);

// "" where there is none.
const char *client_string(struct json_object *object, const char *key);
