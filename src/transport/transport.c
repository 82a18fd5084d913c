#include "transport/transport.h"

#include <assert.h>

const struct transport_ops *const transport_table[TRANSPORT_NR] = {
    &nbd_transport_ops,
};

int transports_start(struct transport_set *set, const struct transport_options *options,
                     const struct transport_addrs *addrs, struct err *err)
{
    for (unsigned i = 0; i < TRANSPORT_NR; i++) {
        const struct transport_ops *ops = transport_table[i];
        struct transport_options asked = *options;
        struct transport *transport;
        int ret;

        if (!ops->takes_listen_fds)
            asked.nr_listen_fds = 0;
        if (!addrs[i].nr_addrs && !asked.nr_listen_fds)
            continue;
        ret = ops->start(&transport, &asked, &addrs[i], err);
        if (ret < 0)
            return ret;
        transport->ops = ops;
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

void transports_device_changed(struct transport_set *set, struct device *dev)
{
    for (unsigned i = 0; i < set->nr_transports; i++) {
        struct transport *transport = set->transports[i];

        if (transport->ops->device_changed)
            transport->ops->device_changed(transport, dev);
    }
}
