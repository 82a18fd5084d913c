#include "control/clean.h"

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "control/client.h"
#include "transport/transport.h"
#include "util/util.h"

// As transport_hold() had it, but for the file descriptor, which went with the process.
static void clean_transport(struct json_object *object)
{
    const char *name = client_string(object, "transport"), *addr = client_string(object, "address");
    struct transport_hold hold = {.addr = addr, .fd = -1};
    struct json_object *facts;

    for (unsigned i = 0; i < TRANSPORT_NR; i++) {
        if (!strcmp(transport_table[i]->name, name))
            hold.ops = transport_table[i];
    }
    if (!hold.ops || !json_object_object_get_ex(object, "address", NULL))
        return;
    if (json_object_object_get_ex(object, "facts", &facts) && json_object_is_type(facts, json_type_array)) {
        for (unsigned i = 0; i < min_of(ARRAY_SIZE(hold.facts), json_object_array_length(facts)); i++)
            hold.facts[i] = json_object_get_uint64(json_object_array_get_idx(facts, i));
    }
    hold.ops->release(&hold);
}

int clean_dead(struct state *state, struct err *err)
{
    char data[STATE_PATH_MAX + 8], *text = state_read(state, "state");
    struct json_object *object = text ? json_tokener_parse(text) : NULL, *transports;

    (void)err;
    free(text);
    if (object && json_object_object_get_ex(object, "transports", &transports) &&
        json_object_is_type(transports, json_type_array)) {
        for (size_t i = 0; i < json_object_array_length(transports); i++)
            clean_transport(json_object_array_get_idx(transports, i));
    }
    json_object_put(object);
    // All were killed when it was mounted, and no state had been written yet.
    snprintf(data, sizeof(data), "%s/data", state->path);
    fuse_transport_ops.release(&(struct transport_hold){.ops = &fuse_transport_ops, .addr = data, .fd = -1});
    state_remove(state);
    return 0;
}
