// The transport against a driver that is made up: a control device, a device file that is a plain file, and a
// ring that keeps the driver's commands.
#include "fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/types.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ring/workers.h"
#include "transport/transport.h"
#include "transport/ublk/ctrl.h"
#include "transport/ublk/ublk.h"

#define MAX_QUEUES 2
#define DEPTH 8
#define STRIDE (UBLK_MAX_DEPTH * sizeof(struct ublk_io_desc))
#define BUF_BYTES UBLK_MAX_IO_BYTES

static struct fake {
    pthread_mutex_t lock;
    const struct ring_ops *base; // does all but RING_CMD
    struct ring_ops ring_ops;
    char dir[64];
    char log[64][32]; // control commands, by number
    unsigned nr_log;
    uint64_t features;
    bool is_old;       // knows no GET_FEATURES
    bool is_there;     // the device
    bool is_user;      // makes the caller one without privileges
    unsigned nr_busy;  // START_USER_RECOVERY says so this often
    enum ublk_cmd bad; // this command fails
    int bad_ret, open_ret;
    struct ublk_dev_info info;
    struct ublk_params params;
    struct ublk_io_desc *descs;
    struct ring_op *fetches[MAX_QUEUES][DEPTH];
    struct ublk_io_cmd cmds[MAX_QUEUES][DEPTH];
    uint32_t cmd_op; // the last
    unsigned nr_fetched;
    sem_t answered;
    unsigned nr_paths; // commands that came with a path
    // Zero copy: a tag's pages are data of the device file, where USER_COPY has them too.
    int data_fd, buf_error;
    atomic_uint nr_buf_ios, nr_reserved; // by each queue's thread
    uint64_t fetch_addr[MAX_QUEUES][DEPTH];
} fake;

// ---- The driver

static void fake_log(unsigned cmd)
{
    // How often STOP_DEV is needed is a matter of time.
    if (cmd == UBLK_STOP_DEV && fake.nr_log && !strcmp(fake.log[fake.nr_log - 1], "07"))
        return;
    snprintf(fake.log[fake.nr_log++], sizeof(fake.log[0]), "%02x", cmd);
}

static void log_is(const char *text)
{
    char all[512] = "";

    for (unsigned i = 0; i < fake.nr_log; i++) {
        strcat(all, i ? " " : "");
        strcat(all, fake.log[i]);
    }
    assert_string_equal(all, text);
    fake.nr_log = 0;
}

static off_t fake_data(unsigned q, unsigned tag)
{
    return (off_t)(UBLK_DATA_OFFSET + ((uint64_t)q << UBLK_DATA_QUEUE_SHIFT) +
                   ((uint64_t)tag << UBLK_DATA_TAG_SHIFT));
}

#define FIRST_BUF 4 // each queue's ring has its own

static int fake_reserve_bufs(struct ring *ring, unsigned nr)
{
    (void)ring;
    if (fake.nr_reserved == UINT_MAX)
        return -1;
    fake.nr_reserved += nr;
    return FIRST_BUF;
}

// With a buffer that the kernel has: between its pages and the image.
static int fake_buf_io(struct ring_op *op)
{
    struct ublk_rq *urq = container_of(container_of(op, struct rq, ring_op), struct ublk_rq, rq);
    off_t at = fake_data(urq->hwq->index, (unsigned)op->buf_index - FIRST_BUF);
    char *buf = aligned_alloc(4096, op->rw.iov->iov_len); // the image has O_DIRECT
    ssize_t n;

    assert_int_equal(op->rw.nr_iov, 1);
    at += (off_t)(uintptr_t)op->rw.iov->iov_base;
    n = op->code == RING_READ ? pread(op->fd, buf, op->rw.iov->iov_len, (off_t)op->rw.offset_bytes)
                              : pread(fake.data_fd, buf, op->rw.iov->iov_len, at);
    assert_true(n >= 0);
    if (op->code == RING_READ)
        assert_int_equal(pwrite(fake.data_fd, buf, (size_t)n, at), n);
    else
        n = pwrite(op->fd, buf, (size_t)n, (off_t)op->rw.offset_bytes);
    free(buf);
    fake.nr_buf_ios++;
    return (int)n;
}

static void fake_ring_queue(struct ring *ring, struct ring_op *op)
{
    struct ublk_io_cmd cmd;

    if ((op->code == RING_READ || op->code == RING_WRITE) && op->buf_index >= FIRST_BUF) {
        ring_post(ring, op, fake.buf_error ? fake.buf_error : fake_buf_io(op));
        return;
    }

    if (op->code != RING_CMD) {
        fake.base->queue(ring, op);
        return;
    }
    assert_int_equal(op->cmd.data_bytes, sizeof(cmd));
    memcpy(&cmd, op->cmd.data, sizeof(cmd));
    assert_true(cmd.q_id < MAX_QUEUES && cmd.tag < DEPTH);
    pthread_mutex_lock(&fake.lock);
    assert_null(fake.fetches[cmd.q_id][cmd.tag]);
    fake.fetches[cmd.q_id][cmd.tag] = op;
    fake.cmds[cmd.q_id][cmd.tag] = cmd;
    fake.fetch_addr[cmd.q_id][cmd.tag] = (uintptr_t)op->cmd.addr;
    fake.cmd_op = op->cmd.op;
    fake.nr_fetched++;
    if ((op->cmd.op & 0xff) == UBLK_COMMIT_AND_FETCH)
        sem_post(&fake.answered);
    pthread_mutex_unlock(&fake.lock);
}

static int fake_ring_create(struct ring **ring, struct err *err)
{
    int ret = fake.base->create(ring, err);

    if (!ret)
        (*ring)->ops = &fake.ring_ops;
    return ret;
}

static void fake_end_fetches(void)
{
    pthread_mutex_lock(&fake.lock);
    for (unsigned q = 0; q < MAX_QUEUES; q++) {
        for (unsigned tag = 0; tag < DEPTH; tag++) {
            struct ring_op *op = fake.fetches[q][tag];

            fake.fetches[q][tag] = NULL;
            if (op)
                ring_post(op->ring, op, -ENODEV);
        }
    }
    fake.nr_fetched = 0;
    pthread_mutex_unlock(&fake.lock);
}

static int fake_open(struct ublk_ctrl *ctrl)
{
    ctrl->fd = -1;
    return fake.open_ret;
}

static void fake_close(struct ublk_ctrl *ctrl)
{
    (void)ctrl;
}

static void fake_wait_for_fetches(void)
{
    for (bool is_there = false; !is_there; usleep(1000)) {
        pthread_mutex_lock(&fake.lock);
        is_there = fake.nr_fetched >= (unsigned)fake.info.nr_hw_queues * fake.info.queue_depth;
        pthread_mutex_unlock(&fake.lock);
    }
}

static void fake_add(void)
{
    char path[UBLK_PATH_BYTES];
    int fd;

    ublk_ctrl_path(path, 'c', fake.info.dev_id);
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, MAX_QUEUES * STRIDE), 0);
    fake.descs = mmap(NULL, MAX_QUEUES * STRIDE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(fake.descs, MAP_FAILED);
    fake.data_fd = fd;
    fake.is_there = true;
}

static void fake_del(void)
{
    char path[UBLK_PATH_BYTES];

    ublk_ctrl_path(path, 'c', fake.info.dev_id);
    unlink(path);
    close(fake.data_fd);
    munmap(fake.descs, MAX_QUEUES * STRIDE);
    fake.is_there = false;
}

static int fake_send(struct ublk_ctrl *ctrl, uint32_t cmd_op, const struct ublk_ctrl_cmd *cmd)
{
    enum ublk_cmd nr = cmd_op & 0xff;
    char *payload = (char *)(uintptr_t)cmd->addr + cmd->dev_path_len;
    struct ublk_dev_info *info = (void *)payload;

    if (nr == UBLK_GET_FEATURES) {
        if (!fake.is_old)
            memcpy(payload, &fake.features, sizeof(fake.features));
        return fake.is_old ? -EOPNOTSUPP : 0;
    }
    if (nr == UBLK_GET_DEV_INFO2 && fake.is_old)
        return -EINVAL;
    assert_int_equal(cmd_op >> 8 != 0, !fake.is_old); // as ioctl, or not
    if (cmd->dev_path_len) {
        fake.nr_paths++;
        assert_true(!memcmp((char *)(uintptr_t)cmd->addr, fake.dir, strlen(fake.dir)));
    }
    if (nr != UBLK_GET_DEV_INFO && nr != UBLK_GET_DEV_INFO2 && nr != UBLK_GET_QUEUE_AFFINITY)
        fake_log(nr);
    if (nr == fake.bad)
        return fake.bad_ret;
    if (nr == UBLK_ADD_DEV && fake.is_user && !(info->flags & UBLK_F_UNPRIVILEGED_DEV))
        return -EPERM;
    switch (nr) {
    case UBLK_ADD_DEV:
        if (fake.is_there)
            return -EEXIST;
        fake.info = *info;
        fake.info.dev_id = info->dev_id == UINT32_MAX ? 3 : info->dev_id;
        fake.info.nr_hw_queues = (uint16_t)min_of(info->nr_hw_queues, MAX_QUEUES);
        *info = fake.info;
        fake_add();
        return 0;
    case UBLK_GET_DEV_INFO:
    case UBLK_GET_DEV_INFO2:
        if (!fake.is_there)
            return -ENODEV;
        memcpy(info, &fake.info, sizeof(*info));
        return 0;
    case UBLK_SET_PARAMS:
        memcpy(&fake.params, payload, sizeof(fake.params));
        return 0;
    case UBLK_START_USER_RECOVERY:
        return fake.nr_busy-- ? -EBUSY : 0;
    case UBLK_START_DEV:
    case UBLK_END_USER_RECOVERY:
        assert_int_equal(cmd->data, getpid());
        fake_wait_for_fetches();
        fake.info.state = UBLK_LIVE;
        return 0;
    case UBLK_STOP_DEV:
        fake.info.state = UBLK_DEAD;
        fake_end_fetches();
        return 0;
    case UBLK_DEL_DEV_ASYNC:
        if (fake.is_old)
            return -EOPNOTSUPP;
        fake_del();
        return 0;
    case UBLK_DEL_DEV:
        fake_del();
        return 0;
    case UBLK_UPDATE_SIZE:
        fake.params.basic.dev_sectors = cmd->data;
        return 0;
    case UBLK_GET_QUEUE_AFFINITY:
        return 0;
    default:
        return -EOPNOTSUPP;
    }
    (void)ctrl;
}

// A request, and what it was answered with.
static int fake_do(unsigned q, unsigned tag, uint32_t op_flags, uint64_t sector, uint32_t nr_sectors)
{
    struct ring_op *op;
    int result;

    fake.descs[q * UBLK_MAX_DEPTH + tag] =
        (struct ublk_io_desc){.op_flags = op_flags, .start_sector = sector, .nr_sectors = nr_sectors};
    pthread_mutex_lock(&fake.lock);
    op = fake.fetches[q][tag];
    assert_non_null(op);
    fake.fetches[q][tag] = NULL;
    pthread_mutex_unlock(&fake.lock);
    ring_post(op->ring, op, 0);
    while (sem_wait(&fake.answered) < 0)
        ;
    pthread_mutex_lock(&fake.lock);
    result = fake.cmds[q][tag].result;
    pthread_mutex_unlock(&fake.lock);
    return result;
}

static char *fake_buf(unsigned q, unsigned tag)
{
    return (char *)(uintptr_t)fake.cmds[q][tag].addr;
}

// ---- A session

struct session {
    struct fixture fixture;
    struct transport_hold hold;
    struct transport_holds holds;
    struct transport_set set;
    struct ring *ring;
    struct err err;
};

static const struct ublk_kernel fake_kernel = {
    .dev_dir = fake.dir,
    .open = fake_open,
    .send = fake_send,
    .close = fake_close,
};

static void fake_init(void **state)
{
    fake = (struct fake){
        .base = ring_ops_of(state),
        .features = UBLK_F_CMD_IOCTL_ENCODE | UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE |
                    UBLK_F_UNPRIVILEGED_DEV | UBLK_F_UPDATE_SIZE,
    };
    fake.ring_ops = *fake.base;
    fake.ring_ops.create = fake_ring_create;
    fake.ring_ops.queue = fake_ring_queue;
    fake.ring_ops.reserve_bufs = fake_reserve_bufs;
    pthread_mutex_init(&fake.lock, NULL);
    sem_init(&fake.answered, 0, 0);
    fixture_make_dir(fake.dir);
    ublk_kernel = &fake_kernel;
}

static int hold(struct session *session, const char *addr, bool is_supervised)
{
    session->hold = (struct transport_hold){.ops = &ublk_transport_ops, .addr = addr, .fd = -1};
    session->holds = (struct transport_holds){.holds = &session->hold, .nr_holds = 1};
    return ublk_transport_ops.hold(&session->hold,
                                   &(struct transport_hold_options){.nr_queues = MAX_QUEUES,
                                                                    .depth = DEPTH,
                                                                    .is_direct = true,
                                                                    .is_supervised = is_supervised},
                                   &session->err);
}

static int start(struct session *session, const struct fixture_options *options)
{
    struct fixture_options all = *options;

    all.ring = &fake.ring_ops;
    all.nr_queues = MAX_QUEUES;
    session->fixture = fixture_create(&all);
    session->set = (struct transport_set){.nr_transports = 0};
    assert_int_equal(ring_create(fake.base, &session->ring, &session->err), 0);
    return transports_start(&session->set,
                            &(struct transport_options){.devs = &session->fixture.dev,
                                                        .nr_devs = 1,
                                                        .ring = session->ring},
                            &session->holds, &session->err);
}

static void begin(struct session *session, void **state, const struct fixture_options *options)
{
    fake_init(state);
    assert_int_equal(hold(session, "", false), 0);
    if (start(session, options) < 0)
        fail_msg("%s", session->err.line);
}

static void stop(struct session *session)
{
    transports_stop(&session->set);
    while (session->set.nr_running)
        assert_int_equal(ring_run(session->ring), 0);
    fixture_stop(&session->fixture);
    ring_destroy(session->ring);
    transports_destroy(&session->set);
    fixture_destroy(&session->fixture);
}

static void end(struct session *session)
{
    stop(session);
    ublk_transport_ops.release(&session->hold);
    assert_false(fake.is_there);
    rmdir(fake.dir);
}

static const struct fixture_options stored = {.io = "buffered", .size_bytes = 4 * MiB};

// ---- Tests

static void a_device_is_made_started_stopped_and_deleted(void **state)
{
    struct session session;

    begin(&session, state, &stored);
    log_is("04 08 06");
    assert_int_equal(session.hold.facts[0], 3);
    assert_int_equal(fake.info.flags, UBLK_F_CMD_IOCTL_ENCODE | UBLK_F_UPDATE_SIZE);
    assert_int_equal(fake.cmd_op, _IOWR('u', UBLK_FETCH, struct ublk_io_cmd));
    end(&session);
    log_is("07 14");
}

static void a_driver_without_features_gets_the_old_numbers(void **state)
{
    struct session session;

    fake_init(state);
    fake.is_old = true;
    assert_int_equal(hold(&session, "5", true), 0);
    assert_int_equal(session.hold.facts[0], 5);
    assert_int_equal(start(&session, &stored), 0);
    assert_int_equal(fake.cmd_op, UBLK_FETCH);
    assert_int_equal(fake_do(0, 0, UBLK_OP_FLUSH, UINT64_MAX, 0), 0);
    assert_int_equal(fake.cmd_op, UBLK_COMMIT_AND_FETCH);
    end(&session);
    log_is("04 08 06 07 14 05");
}

static void requests_reach_the_image(void **state)
{
    struct session session;
    char *buf;

    begin(&session, state, &stored);
    for (unsigned q = 0; q < MAX_QUEUES; q++) {
        for (unsigned tag = 0; tag < DEPTH; tag++) {
            uint64_t sector = (q * DEPTH + tag) * 16;

            buf = fake_buf(q, tag);
            memset(buf, (int)(1 + sector / 16), 8192);
            assert_int_equal(fake_do(q, tag, UBLK_OP_WRITE | (tag & 1 ? UBLK_IO_F_FUA : 0), sector, 16),
                             8192);
            memset(buf, 0, 8192);
        }
    }
    for (unsigned q = 0; q < MAX_QUEUES; q++) {
        for (unsigned tag = 0; tag < DEPTH; tag++) {
            unsigned other = DEPTH - 1 - tag;
            char byte = (char)(1 + q * DEPTH + tag);

            buf = fake_buf(q, other);
            assert_int_equal(fake_do(q, other, UBLK_OP_READ, (q * DEPTH + tag) * 16, 16), 8192);
            assert_true(buf[0] == byte && buf[8191] == byte);
        }
    }
    buf = fake_buf(1, 2);
    assert_int_equal(fake_do(1, 2, UBLK_OP_DISCARD, 0, 16), 0);
    assert_int_equal(fake_do(1, 2, UBLK_OP_READ, 0, 16), 8192);
    assert_true(!buf[0] && !buf[8191]);
    assert_int_equal(fake_do(1, 2, UBLK_OP_WRITE_ZEROES | UBLK_IO_F_NOUNMAP | UBLK_IO_F_FUA, 16, 16), 0);
    assert_int_equal(fake_do(1, 2, UBLK_OP_READ, 16, 16), 8192);
    assert_true(!buf[0] && !buf[8191]);
    assert_int_equal(fake_do(0, 7, UBLK_OP_FLUSH, UINT64_MAX, 0), 0);
    end(&session);
}

// The kernel would not: nothing is read or written for it.
static void nonsense_is_refused(void **state)
{
    struct session session;

    begin(&session, state, &stored);
    assert_int_equal(fake_do(0, 0, 4, 0, 8), -EOPNOTSUPP);
    assert_int_equal(fake_do(0, 0, 0xff, 0, 8), -EOPNOTSUPP);
    assert_int_equal(fake_do(0, 0, UBLK_OP_READ, 0, 0), -EINVAL);
    assert_int_equal(fake_do(0, 0, UBLK_OP_READ, 0, BUF_BYTES / 512 + 1), -EINVAL);
    assert_int_equal(fake_do(0, 0, UBLK_OP_WRITE, 0, UINT32_MAX), -EINVAL);
    assert_int_equal(fake_do(0, 0, UBLK_OP_READ, UINT64_MAX / 512 + 1, 8), -EINVAL);
    assert_int_equal(fake_do(0, 0, UBLK_OP_WRITE, UINT64_MAX, 8), -EINVAL);
    assert_int_equal(fake_do(0, 0, UBLK_OP_READ, UINT64_MAX / 512, 8), -EINVAL);
    assert_int_equal(fake_do(0, 0, UBLK_OP_WRITE, 4 * MiB / 512 - 7, 8), -ENOSPC);
    assert_int_equal(fake_do(0, 0, UBLK_OP_READ, 0, BUF_BYTES / 512), BUF_BYTES);
    end(&session);
}

static void errors_of_the_image_are_told(void **state)
{
    struct session session;

    begin(&session, state, &(struct fixture_options){.io = "fault:io=buffered,any.error=1:ENOSPC"});
    assert_int_equal(fake_do(0, 0, UBLK_OP_WRITE, 0, 8), -ENOSPC);
    assert_int_equal(fake_do(0, 0, UBLK_OP_FLUSH, 0, 0), -ENOSPC);
    end(&session);
}

static void a_quiesced_device_is_recovered(void **state)
{
    struct session session;

    fake_init(state);
    assert_int_equal(hold(&session, "", true), 0);
    assert_true(fake.info.flags & UBLK_F_USER_RECOVERY && fake.info.flags & UBLK_F_USER_RECOVERY_REISSUE);
    fake.info.state = UBLK_QUIESCED; // a worker has died
    fake.nr_busy = 2;
    assert_int_equal(start(&session, &stored), 0);
    log_is("04 10 10 10 11");
    assert_int_equal(fake_do(1, 1, UBLK_OP_FLUSH, 0, 0), 0);
    end(&session);
}

static void a_device_left_behind_is_taken_over(void **state)
{
    struct session session, other;

    fake_init(state);
    assert_int_equal(hold(&session, "7", true), 0);
    assert_int_equal(hold(&other, "7", true), -EEXIST); // in use, as far as anybody knows
    assert_non_null(strstr(other.err.line, "device 7 is in use"));
    fake.info.state = UBLK_QUIESCED;
    assert_int_equal(hold(&other, "7", true), 0);
    log_is("04 04 04");
    assert_int_equal(start(&other, &stored), 0);
    log_is("10 11");
    stop(&other);
    fake.info.ublksrv_pid = -1; // no worker, and nothing waits: like new
    assert_int_equal(hold(&other, "7", false), 0);
    log_is("07 04 05 04");
    assert_int_equal(start(&other, &stored), 0);
    log_is("08 06");
    end(&other);
}

static void a_start_that_fails_takes_all_back(void **state)
{
    static const enum ublk_cmd bad[] = {UBLK_SET_PARAMS, UBLK_START_DEV};

    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct session session;

        fake_init(state);
        assert_int_equal(hold(&session, "", false), 0);
        fake.bad = bad[i];
        fake.bad_ret = -EINVAL;
        assert_int_equal(start(&session, &stored), -EINVAL);
        assert_non_null(strstr(session.err.line, "ublkb3: starting: Invalid argument"));
        assert_int_equal(session.set.nr_running, 0);
        fake.bad = 0;
        end(&session);
    }
}

static void no_driver_is_said(void **state)
{
    struct session session;

    fake_init(state);
    fake.open_ret = -ENOENT;
    assert_int_equal(hold(&session, "", false), -ENOENT);
    assert_non_null(strstr(session.err.line, "modprobe ublk_drv"));
    fake.open_ret = -EACCES;
    assert_int_equal(hold(&session, "", false), -EACCES);
    assert_non_null(strstr(session.err.line, "udev rule"));
    assert_int_equal(hold(&session, "1048576", false), -EINVAL);
    assert_true(session.err.is_usage);
    rmdir(fake.dir);
}

static void a_device_of_a_user_is_named_by_its_path(void **state)
{
    struct session session;

    fake_init(state);
    fake.is_user = true;
    assert_int_equal(hold(&session, "", true), 0);
    assert_int_equal(fake.info.flags & (UBLK_F_UNPRIVILEGED_DEV | UBLK_F_USER_RECOVERY),
                     UBLK_F_UNPRIVILEGED_DEV);
    assert_int_equal(start(&session, &stored), 0);
    assert_true(fake.nr_paths >= 3);
    assert_int_equal(fake.params.basic.dev_sectors, 4 * MiB / 512); // came behind the path
    assert_int_equal(fake_do(0, 0, UBLK_OP_FLUSH, 0, 0), 0);
    end(&session);
}

static void data_put(unsigned q, unsigned tag, const char *buf, size_t len)
{
    assert_int_equal(pwrite(fake.data_fd, buf, len, fake_data(q, tag)), len);
}

static void data_is(unsigned q, unsigned tag, size_t from, size_t len, char byte)
{
    char *buf = malloc(len);

    assert_int_equal(pread(fake.data_fd, buf, len, fake_data(q, tag) + (off_t)from), len);
    for (size_t i = 0; i < len; i++)
        assert_int_equal(buf[i], byte);
    free(buf);
}

static void begin_zero_copy(struct session *session, void **state, const struct fixture_options *options)
{
    fake_init(state);
    fake.features |= UBLK_F_USER_COPY | UBLK_F_AUTO_BUF_REG;
    assert_int_equal(hold(session, "", false), 0);
    if (start(session, options) < 0)
        fail_msg("%s", session->err.line);
    assert_true(fake.info.flags & UBLK_F_AUTO_BUF_REG && fake.info.flags & UBLK_F_USER_COPY);
}

// Writes and reads 8 KiB on every tag; every second one without a buffer of the kernel's.
static void zero_copy_round(uint32_t other_flags)
{
    char data[8192];

    for (unsigned i = 0; i < 2 * MAX_QUEUES * DEPTH; i++) {
        unsigned q = i % MAX_QUEUES, tag = i / MAX_QUEUES % DEPTH;
        uint32_t flags = tag & 1 ? other_flags : 0;

        memset(data, (int)(1 + i), sizeof(data));
        data_put(q, tag, data, sizeof(data));
        assert_int_equal(fake_do(q, tag, UBLK_OP_WRITE | flags, 16 * i, 16), 8192);
        memset(data, 0, sizeof(data));
        data_put(q, tag, data, sizeof(data));
        assert_int_equal(fake_do(q, tag, UBLK_OP_READ | flags, 16 * i, 16), 8192);
        data_is(q, tag, 0, sizeof(data), (char)(1 + i));
    }
}

static void data_need_not_be_copied(void **state)
{
    struct session session;

    begin_zero_copy(&session, state, &(struct fixture_options){.io = "direct", .size_bytes = 4 * MiB});
    assert_int_equal(fake.nr_reserved, MAX_QUEUES * DEPTH);
    assert_int_equal(fake_buf(1, 3), NULL);
    assert_int_equal(fake.fetch_addr[1][3], (FIRST_BUF + 3) | UBLK_AUTO_BUF_REG_FALLBACK);
    assert_true(fake.params.types & UBLK_PARAM_DMA_ALIGN);
    zero_copy_round(0);
    assert_int_equal(fake.nr_buf_ios, 4 * MAX_QUEUES * DEPTH);
    zero_copy_round(UBLK_IO_F_NEED_REG_BUF);
    assert_int_equal(fake.nr_buf_ios, 6 * MAX_QUEUES * DEPTH);
    assert_int_equal(fake_do(0, 7, UBLK_OP_FLUSH | UBLK_IO_F_NEED_REG_BUF, UINT64_MAX, 0), 0);
    assert_int_equal(fake_do(0, 7, UBLK_OP_DISCARD, 0, 16), 0);
    end(&session);
}

static void data_is_copied_by_hand_for_what_has_to_see_it(void **state)
{
    static const char *const ios[] = {"buffered", "null", "fault:io=buffered"};

    for (unsigned i = 0; i < ARRAY_SIZE(ios); i++) {
        struct session session;
        char byte = 1;

        begin_zero_copy(&session, state, &(struct fixture_options){.io = ios[i], .size_bytes = 4 * MiB});
        if (i == 1) {
            data_put(0, 0, &byte, 1);
            assert_int_equal(fake_do(0, 0, UBLK_OP_READ, 0, 16), 8192);
            data_is(0, 0, 0, 8192, 0);
        } else {
            zero_copy_round(0);
        }
        assert_int_equal(fake.nr_buf_ios, 0);
        end(&session);
    }
}

static void a_ring_without_room_has_data_copied_by_hand(void **state)
{
    struct session session;

    fake_init(state);
    fake.features |= UBLK_F_USER_COPY | UBLK_F_AUTO_BUF_REG;
    fake.nr_reserved = UINT_MAX;
    assert_int_equal(hold(&session, "", false), 0);
    assert_int_equal(start(&session, &(struct fixture_options){.io = "direct", .size_bytes = 4 * MiB}), 0);
    assert_int_equal(fake.fetch_addr[0][0], UINT16_MAX | UBLK_AUTO_BUF_REG_FALLBACK);
    assert_int_equal(fake_do(0, 0, UBLK_OP_READ | UBLK_IO_F_NEED_REG_BUF, 0, 16), 8192);
    assert_int_equal(fake.nr_buf_ios, 0);
    end(&session);
}

// The file cannot, or a worker has to go on with it.
static void a_buffer_that_is_refused_is_copied_by_hand(void **state)
{
    static const int errors[] = {-EINVAL, -EFAULT, -EOPNOTSUPP, -EAGAIN, -EINTR};

    for (unsigned i = 0; i < ARRAY_SIZE(errors); i++) {
        struct session session;

        begin_zero_copy(&session, state, &(struct fixture_options){.io = "direct", .size_bytes = 4 * MiB});
        fake.buf_error = errors[i];
        zero_copy_round(0);
        fake.buf_error = -EIO;
        assert_int_equal(fake_do(0, 0, UBLK_OP_READ, 0, 16), -EIO);
        end(&session);
    }
}

// The image ends within the request: zeroes from there on, and what came before stays.
static void what_is_behind_the_end_of_the_image_is_zeroes(void **state)
{
    struct session session;
    char data[16384];

    begin_zero_copy(&session, state, &(struct fixture_options){.io = "direct", .size_bytes = 4 * MiB});
    memset(data, 7, sizeof(data));
    data_put(1, 2, data, sizeof(data));
    assert_int_equal(fake_do(1, 2, UBLK_OP_WRITE, 0, 32), 16384);
    assert_int_equal(ftruncate(session.fixture.dev->image->fd, 4096), 0);
    assert_int_equal(fake_do(1, 2, UBLK_OP_READ, 0, 32), 16384);
    data_is(1, 2, 0, 4096, 7);
    data_is(1, 2, 4096, 12288, 0);
    end(&session);
}

static void not_every_device_goes_without_copies(void **state)
{
    struct session session;

    fake_init(state);
    fake.features |= UBLK_F_AUTO_BUF_REG; // what has to be seen could not be
    assert_int_equal(hold(&session, "", false), 0);
    assert_false(fake.info.flags & (UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY));
    ublk_transport_ops.release(&session.hold);
    fake.features |= UBLK_F_USER_COPY;
    fake.is_user = true;
    assert_int_equal(hold(&session, "", false), 0);
    assert_false(fake.info.flags & (UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY));
    ublk_transport_ops.release(&session.hold);
    rmdir(fake.dir);
}

static void a_new_size_is_told(void **state)
{
    struct session session;

    begin(&session, state, &stored);
    session.fixture.dev->limits.size_bytes = 8 * MiB + 100;
    assert_int_equal(transports_device_changed(&session.set, session.fixture.dev, &session.err), 0);
    assert_int_equal(fake.params.basic.dev_sectors, 8 * MiB / 512);
    fake.bad = UBLK_UPDATE_SIZE;
    fake.bad_ret = -EIO;
    assert_int_equal(transports_device_changed(&session.set, session.fixture.dev, &session.err), 0);
    session.fixture.dev->limits.size_bytes = 4 * MiB;
    assert_int_equal(transports_device_changed(&session.set, session.fixture.dev, &session.err), -EIO);
    end(&session);
}

static void a_driver_that_cannot_change_the_size_is_named(void **state)
{
    struct session session;

    fake_init(state);
    fake.features &= ~UBLK_F_UPDATE_SIZE;
    assert_int_equal(hold(&session, "", false), 0);
    assert_int_equal(start(&session, &stored), 0);
    assert_int_equal(transports_device_changed(&session.set, session.fixture.dev, &session.err), 0);
    session.fixture.dev->limits.size_bytes = 8 * MiB;
    assert_int_equal(transports_device_changed(&session.set, session.fixture.dev, &session.err), -EOPNOTSUPP);
    assert_non_null(strstr(session.err.line, "ublkb3 keeps its size: this kernel cannot"));
    end(&session);
}

static struct ublk_params params_with(uint32_t min_block, uint32_t preferred, bool is_read_only,
                                      bool has_cache)
{
    struct image image = {.is_read_only = is_read_only};
    struct device dev = {
        .image = &image,
        .limits = {.size_bytes = 10 * MiB + 5000,
                   .min_block_bytes = min_block,
                   .preferred_block_bytes = preferred,
                   .max_transfer_bytes = LIMITS_MAX_TRANSFER_BYTES},
        .durability = {.has_volatile_cache = has_cache},
    };

    return ublk_params_of(&dev, &(struct ublk_dev_info){.max_io_buf_bytes = BUF_BYTES});
}

static void parameters_follow_from_the_device(void **state)
{
    struct ublk_params params = params_with(1, 4096, false, true);

    (void)state;
    assert_int_equal(params.basic.logical_bs_shift, 9);
    assert_int_equal(params.basic.physical_bs_shift, 12);
    assert_int_equal(params.basic.dev_sectors, (10 * MiB + 5000) / 512);
    assert_int_equal(params.basic.max_sectors, BUF_BYTES / 512);
    assert_int_equal(params.basic.attrs, UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA);
    assert_int_equal(params.types, UBLK_PARAM_BASIC | UBLK_PARAM_DISCARD);
    assert_int_equal(params.discard.granularity, 4096);
    assert_int_equal(params.discard.max_segments, 1);
    assert_true(params.discard.max_sectors && params.discard.max_write_zeroes_sectors);

    params = params_with(4096, 4096, false, false);
    assert_int_equal(params.basic.logical_bs_shift, 12);
    assert_int_equal(params.basic.dev_sectors, (10 * MiB + 4096) / 512);
    assert_int_equal(params.basic.attrs, 0);

    params = params_with(512, 65536, true, false);
    assert_int_equal(params.basic.physical_bs_shift, 16);
    assert_int_equal(params.basic.attrs, UBLK_ATTR_READ_ONLY);
    assert_int_equal(params.types, UBLK_PARAM_BASIC);
}

int main(void)
{
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_device_is_made_started_stopped_and_deleted),
        cmocka_unit_test(a_driver_without_features_gets_the_old_numbers),
        cmocka_unit_test(requests_reach_the_image),
        cmocka_unit_test(nonsense_is_refused),
        cmocka_unit_test(errors_of_the_image_are_told),
        cmocka_unit_test(a_quiesced_device_is_recovered),
        cmocka_unit_test(a_device_left_behind_is_taken_over),
        cmocka_unit_test(a_start_that_fails_takes_all_back),
        cmocka_unit_test(no_driver_is_said),
        cmocka_unit_test(a_device_of_a_user_is_named_by_its_path),
        cmocka_unit_test(data_need_not_be_copied),
        cmocka_unit_test(data_is_copied_by_hand_for_what_has_to_see_it),
        cmocka_unit_test(a_ring_without_room_has_data_copied_by_hand),
        cmocka_unit_test(a_buffer_that_is_refused_is_copied_by_hand),
        cmocka_unit_test(what_is_behind_the_end_of_the_image_is_zeroes),
        cmocka_unit_test(not_every_device_goes_without_copies),
        cmocka_unit_test(a_new_size_is_told),
        cmocka_unit_test(a_driver_that_cannot_change_the_size_is_named),
        cmocka_unit_test(parameters_follow_from_the_device),
    };

    return run_on_both_rings(tests);
}
