#include "transport/transport.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>

const struct transport_ops *const transport_table[TRANSPORT_NR] = {
    &nbd_transport_ops,
    &ublk_transport_ops,
    &vhost_user_transport_ops,
    &fuse_transport_ops,
};

static bool is_listening(int fd)
{
    int is_on = 0, type = 0;
    socklen_t len = sizeof(int);

    return !getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &is_on, &len) && is_on &&
           !getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) && type == SOCK_STREAM;
}

int transports_hold(struct transport_holds *holds, const struct transport_addrs *addrs, const int *listen_fds,
                    unsigned nr_listen_fds, const struct transport_hold_options *options, struct err *err)
{
    struct transport_hold_options with_holds = *options;
    unsigned nr = nr_listen_fds;
    int ret;

    with_holds.holds = holds;
    *holds = (struct transport_holds){0};
    // First: a number that is not open would soon be that of something else.
    for (unsigned i = 0; i < nr_listen_fds; i++) {
        if (!is_listening(listen_fds[i]))
            return err_set(
                err, -EINVAL,
                "LISTEN_FDS: file descriptor %d is no listening stream socket; pass only such ones",
                listen_fds[i]);
    }
    for (unsigned i = 0; i < TRANSPORT_NR; i++)
        nr += addrs[i].nr_addrs;
    if (!nr)
        return 0;
    holds->max_holds = nr;
    holds->holds = mmap(NULL, nr * sizeof(*holds->holds), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                        -1, 0); // T1
    if (holds->holds == MAP_FAILED) {
        *holds = (struct transport_holds){0};
        return err_set(err, -ENOMEM, "out of memory");
    }
    for (unsigned i = 0; i < TRANSPORT_NR; i++) {
        const struct transport_ops *ops = transport_table[i];

        for (unsigned j = 0; j < addrs[i].nr_addrs; j++) {
            struct transport_hold *hold = &holds->holds[holds->nr_holds];

            *hold = (struct transport_hold){.ops = ops, .addr = addrs[i].addrs[j], .fd = -1};
            ret = ops->hold(hold, &with_holds, err);
            if (ret < 0)
                goto out_release;
            holds->nr_holds++;
        }
        for (unsigned j = 0; ops->takes_listen_fds && j < nr_listen_fds; j++)
            holds->holds[holds->nr_holds++] = (struct transport_hold){.ops = ops, .fd = listen_fds[j]};
    }
    return 0;

out_release:
    transports_release(holds);
    return ret;
}

void transports_release(struct transport_holds *holds)
{
    while (holds->nr_holds) {
        struct transport_hold *hold = &holds->holds[--holds->nr_holds];

        hold->ops->release(hold);
    }
    if (holds->holds)
        munmap(holds->holds, holds->max_holds * sizeof(*holds->holds));
    holds->holds = NULL;
}

int transports_start(struct transport_set *set, const struct transport_options *options,
                     const struct transport_holds *holds, struct err *err)
{
    for (unsigned i = 0, nr; i < holds->nr_holds; i += nr) {
        struct transport_hold *hold = &holds->holds[i];
        struct transport *transport;
        int ret;

        for (nr = 1; i + nr < holds->nr_holds && hold[nr].ops == hold->ops; nr++)
            ;
        ret = hold->ops->start(&transport, options, hold, nr, err);
        if (ret < 0)
            return ret;
        transport->ops = hold->ops;
        transport->set = set;
        set->transports[set->nr_transports++] = transport;
        set->nr_running++;
    }
    return 0;
}

void transports_stop(struct transport_set *set)
{
    for (unsigned i = 0; i < set->nr_transports; i++)
        set->transports[i]->ops->stop(set->transports[i]);
}

void transport_stopped(struct transport *transport)
{
    assert(transport->set->nr_running);
    transport->set->nr_running--;
}

void transports_destroy(struct transport_set *set)
{
    while (set->nr_transports) {
        struct transport *transport = set->transports[--set->nr_transports];

        transport->ops->destroy(transport);
    }
}

int transports_busy(struct transport_set *set, struct err *err)
{
    int ret = 0;

    for (unsigned i = 0; i < set->nr_transports && !ret; i++) {
        struct transport *transport = set->transports[i];

        if (transport->ops->busy)
            ret = transport->ops->busy(transport, err);
    }
    return ret;
}

void transport_hold_uri(const struct transport_hold *hold, char *uri, unsigned uri_bytes)
{
    if (hold->ops->uri)
        hold->ops->uri(hold, uri, uri_bytes);
    else
        snprintf(uri, uri_bytes, "%s", hold->addr);
}

int transports_device_changed(struct transport_set *set, struct device *dev, struct err *err)
{
    int result = 0;

    for (unsigned i = 0; i < set->nr_transports; i++) {
        struct transport *transport = set->transports[i];
        int ret = transport->ops->device_changed ? transport->ops->device_changed(transport, dev, err) : 0;

        result = ret < 0 ? ret : result;
    }
    return result;
}
