#include "control/client.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/server.h"
#include "util/util.h"

#define ANSWER_MAX_BYTES (1 << 20)
#define PATIENCE_SEC 120 // an answer waits for a flush, or for requests that are in flight
#define DESCRIBE_SEC 5   // "show" waits for nothing; who lists all devices waits for each

int client_open(struct client *client, const struct state *state, struct err *err)
{
    struct sockaddr_un sun = {.sun_family = AF_UNIX};
    int ret;

    *client = (struct client){.fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
    if (client->fd < 0)
        return err_set(err, -errno, "socket: %s", strerror(errno));
    client_set_patience(client, PATIENCE_SEC);
    // By way of the directory, whose own path may be too long for this.
    snprintf(sun.sun_path, sizeof(sun.sun_path), "/proc/self/fd/%d/control", state->fd);
    if (connect(client->fd, (struct sockaddr *)&sun, sizeof(sun)) < 0) {
        ret = err_set(err, -errno, "%s: its control socket: %s", state->name, strerror(errno));
        client_close(client);
        return ret;
    }
    return 0;
}

void client_set_patience(struct client *client, unsigned seconds)
{
    struct timeval patience = {.tv_sec = seconds};

    setsockopt(client->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    setsockopt(client->fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
}

void client_close(struct client *client)
{
    close(client->fd);
    free(client->in);
    *client = (struct client){.fd = -1};
}

static int client_send(struct client *client, const char *text)
{
    size_t len = strlen(text);

    while (len) {
        ssize_t n = send(client->fd, text, len, MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        text += n;
        len -= (size_t)n;
    }
    return 0;
}

// A line of its own, without its end; to be freed. NULL: none came.
static char *client_line(struct client *client)
{
    if (!client->in)
        client->in = malloc(ANSWER_MAX_BYTES);
    while (client->in) {
        char *end = memchr(client->in, '\n', client->in_len), *line;
        ssize_t n;

        if (end) {
            size_t len = (size_t)(end - client->in);

            line = strndup(client->in, len);
            client->in_len -= len + 1;
            memmove(client->in, end + 1, client->in_len);
            return line;
        }
        if (client->in_len == ANSWER_MAX_BYTES)
            return NULL;
        n = recv(client->fd, client->in + client->in_len, ANSWER_MAX_BYTES - client->in_len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        client->has_timed_out = n < 0 && errno == EAGAIN;
        if (n <= 0)
            return NULL;
        client->in_len += (size_t)n;
    }
    return NULL;
}

struct json_object *client_ask(struct client *client, struct json_object *request, struct err *err)
{
    struct json_object *answer = NULL, *ok;
    char *line = NULL;
    int ret;

    json_object_object_add(request, "bight", json_object_new_int(SERVER_VERSION));
    ret = client_send(client, json_object_to_json_string_ext(request, JSON_C_TO_STRING_PLAIN)) < 0 ||
          client_send(client, "\n") < 0;
    json_object_put(request);
    if (!ret)
        line = client_line(client);
    if (line)
        answer = server_parse(line, strlen(line), err);
    else
        err_set(err, -EIO, "no answer; is it stopping, or busy? see bight list");
    free(line);
    client->has_answered = answer;
    client->has_ended = json_object_get_boolean(json_object_object_get(answer, "ended"));
    if (!answer || (json_object_object_get_ex(answer, "ok", &ok) && json_object_get_boolean(ok)))
        return answer;
    err_set(err, -EINVAL, "%s", client_string(answer, "error"));
    err->is_usage = json_object_get_boolean(json_object_object_get(answer, "usage"));
    json_object_put(answer);
    return NULL;
}

struct json_object *client_request(const char *verb)
{
    struct json_object *request = json_object_new_object();

    json_object_object_add(request, "verb", json_object_new_string(verb));
    return request;
}

const char *client_string(struct json_object *object, const char *key)
{
    struct json_object *value;
    const char *text = json_object_object_get_ex(object, key, &value) ? json_object_get_string(value) : NULL;

    return text ? text : "";
}

struct json_object *client_describe(const struct state *state, struct err *err)
{
    const char *how = "starting";
    struct json_object *object;
    struct client client;
    struct stat st;
    char *text;

    if (state_is_alive(state) && !client_open(&client, state, err)) {
        client_set_patience(&client, DESCRIBE_SEC);
        object = client_ask(&client, client_request("show"), err);
        client_close(&client);
        if (object)
            return object;
        how = "silent";
    }
    if (!fstat(state->fd, &st) && !st.st_nlink) {
        err_set(err, -ENOENT, "%s: is gone", state->name);
        return NULL;
    }
    text = state_read(state, "state");
    object = text ? json_tokener_parse(text) : NULL;
    free(text);
    if (!object || !json_object_is_type(object, json_type_object)) {
        json_object_put(object);
        object = json_object_new_object();
        json_object_object_add(object, "name", json_object_new_string(state->name));
    }
    json_object_object_add(object, "state", json_object_new_string(state_is_alive(state) ? how : "dead"));
    return object;
}

// ---- Who is meant

struct search {
    const char *text;
    char real[PATH_MAX]; // of text as a path, or ""
    char name[STATE_NAME_MAX + 1];
    unsigned nr_found;
};

static bool search_matches(const struct search *search, struct json_object *object)
{
    struct json_object *transports;
    const char *image = client_string(object, "image");

    if (!strcmp(client_string(object, "device"), search->text) ||
        (search->real[0] &&
         (!strcmp(image, search->real) || !strcmp(client_string(object, "device"), search->real))))
        return true;
    if (!json_object_object_get_ex(object, "transports", &transports))
        return false;
    for (size_t i = 0; i < json_object_array_length(transports); i++) {
        struct json_object *transport = json_object_array_get_idx(transports, i);

        if (!strcmp(client_string(transport, "uri"), search->text) ||
            !strcmp(client_string(transport, "address"), search->text) ||
            (search->real[0] && !strcmp(client_string(transport, "address"), search->real)))
            return true;
    }
    return false;
}

static void search_look(const char *name, void *arg)
{
    struct search *search = arg;
    struct json_object *object;
    struct state state;
    struct err err;

    if (state_open(&state, name, &err) < 0)
        return;
    object = client_describe(&state, &err);
    if (object && search_matches(search, object)) {
        strcpy(search->name, name);
        search->nr_found++;
    }
    json_object_put(object);
    state_close(&state);
}

int client_find(struct state *state, const char *text, struct err *err)
{
    struct search search = {.text = text};
    int ret = state_open(state, text, err);

    if (!ret || (ret != -ENOENT && ret != -ENOTDIR))
        return ret;
    if (!realpath(text, search.real))
        search.real[0] = '\0';
    ret = state_each(search_look, &search, err);
    if (ret < 0)
        return ret;
    if (!search.nr_found)
        return err_set(err, -ENOENT, "%s: no attached device, image or name; see bight list", text);
    if (search.nr_found > 1)
        return err_set(err, -EINVAL, "%s: is attached more than once; name one of them (bight list)", text);
    return state_open(state, search.name, err);
}
