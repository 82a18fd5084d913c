// A line of the control socket: an object of our version, or refused with a line; nothing is leaked.

#include "fuzz.h"

#include <string.h>

#include "control/server.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    char *line = malloc(len + !len);
    struct json_object *request;
    struct err err = {.line = ""};

    memcpy(line, data, len);
    request = server_parse(line, len, &err);
    must(!request == !!err.line[0]);
    must(!request || json_object_is_type(request, json_type_object));
    json_object_put(request);
    free(line);
    return 0;
}
