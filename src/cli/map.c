// bight map: the extents of a file, as a table, a strip, a picture or JSON.

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/ask.h"
#include "cli/cli.h"
#include "map/fastfs.h"
#include "map/fiemap.h"
#include "util/log.h"
#include "util/util.h"

#define STRIP_MAX_CELLS 200
#define SVG_COLUMNS 128
#define SVG_ROWS 32
#define SVG_CELL 8
#define FRAGMENTED 8 // pieces in a cell from which on its colour is the darkest

static const char map_help[] =
    "usage: bight map [OPTIONS] IMAGE\n"
    "\n"
    "Shows where a file's extents are: how many, how long, what is hole, unwritten or shared, a strip of\n"
    "its fragmentation, and whether --map fastfs could redirect its I/O.\n"
    "\n"
    "  --json               all of it, with every extent, for programs\n"
    "  --svg FILE           the strip as a picture\n"
    "  -h, --help\n"
    "\n"
    "See bight-map(1).\n";

static const struct option map_options[] = {
    {"json", no_argument, NULL, 'j'},
    {"svg", required_argument, NULL, 's'},
    {"help", no_argument, NULL, 'h'},
    {NULL, 0, NULL, 0},
};

static const struct {
    const char *name, *cell;
    unsigned colour;   // of the terminal (256)
    const char *shade; // of the picture; written: by the number of pieces
} states[FILE_NR_STATES] = {
    [FILE_HOLE] = {"hole", "·", 240, "#e8e8e8"},          [FILE_WRITTEN] = {"written", "█", 34, NULL},
    [FILE_UNWRITTEN] = {"unwritten", "░", 67, "#a8c4e0"}, [FILE_SHARED] = {"shared", "▓", 135, "#b090d0"},
    [FILE_OTHER] = {"other", "▒", 208, "#f0a030"},
};

struct state_sum {
    uint64_t nr_extents, bytes, min_bytes, max_bytes;
};

struct file_map {
    const char *path, *svg;
    bool is_json;
    uint64_t size_bytes;
    struct fastfs_place place;
    struct err fastfs; // why not
    bool can_fastfs;
    struct file_extent *extents; // holes too
    size_t nr_extents, max_extents;
    struct state_sum sums[FILE_NR_STATES];
};

// A piece of the file in a strip: what most of it is, and in how many pieces.
struct cell {
    enum file_state state;
    unsigned nr_pieces;
};

static int take_extent(void *arg, const struct file_extent *ext)
{
    struct file_map *map = arg;
    struct file_extent *last = map->nr_extents ? &map->extents[map->nr_extents - 1] : NULL;

    // The kernel cuts what is one to us: where its records are full, or a reference ends.
    if (last && last->state == ext->state &&
        (ext->state == FILE_HOLE || last->physical_bytes + last->len_bytes == ext->physical_bytes)) {
        last->len_bytes += ext->len_bytes;
        return 0;
    }
    if (map->nr_extents == map->max_extents) {
        size_t max_extents = map->max_extents ? map->max_extents * 2 : 1024;
        void *more = reallocarray(map->extents, max_extents, sizeof(*map->extents));

        if (!more)
            return -ENOMEM;
        map->extents = more;
        map->max_extents = max_extents;
    }
    assert(map->extents);
    map->extents[map->nr_extents++] = *ext;
    return 0;
}

static void sum_up(struct file_map *map)
{
    for (size_t i = 0; i < map->nr_extents; i++) {
        const struct file_extent *ext = &map->extents[i];
        struct state_sum *sum = &map->sums[ext->state];

        sum->min_bytes = sum->nr_extents ? min_of(sum->min_bytes, ext->len_bytes) : ext->len_bytes;
        sum->max_bytes = max_of(sum->max_bytes, ext->len_bytes);
        sum->nr_extents++;
        sum->bytes += ext->len_bytes;
    }
}

// Without FIEMAP: what is data and what is hole, and nothing of where.
static int seek_map(struct file_map *map, int fd)
{
    uint64_t at = 0;

    while (at < map->size_bytes) {
        off_t data = lseek(fd, (off_t)at, SEEK_DATA), next;
        bool is_hole = data < 0 ? errno == ENXIO : (uint64_t)data > at;
        struct file_extent ext = {.start_bytes = at, .state = is_hole ? FILE_HOLE : FILE_OTHER};
        int ret;

        if (data < 0 && errno != ENXIO)
            return -errno;
        next = data < 0 ? (off_t)map->size_bytes : is_hole ? data : lseek(fd, (off_t)at, SEEK_HOLE);
        ext.len_bytes =
            next > (off_t)at ? min_of((uint64_t)next, map->size_bytes) - at : map->size_bytes - at;
        ret = take_extent(map, &ext);
        if (ret < 0)
            return ret;
        at += ext.len_bytes;
    }
    return 0;
}

static int read_map(struct file_map *map, struct err *err)
{
    struct fiemap_walk walk = {.take = take_extent, .arg = map};
    struct stat st;
    int fd, ret;

    assert(map->path);
    // O_NONBLOCK: neither a FIFO nor somebody's lease is waited for without end.
    fd = open(map->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    // EWOULDBLOCK: a bight that redirects this very file lets go of it; that is waited for.
    if (fd < 0 && errno == EWOULDBLOCK)
        fd = open(map->path, O_RDONLY | O_CLOEXEC | O_NOCTTY);
    if (fd < 0 || fstat(fd, &st) < 0) {
        ret = err_set(err, -errno, "%s: %s; name a file that you may read", map->path, strerror(errno));
        goto out;
    }
    if (!S_ISREG(st.st_mode)) {
        ret = err_set(err, -EINVAL, "%s: is no regular file; only files have extents", map->path);
        goto out;
    }
    map->size_bytes = (uint64_t)st.st_size;
    map->can_fastfs = !fastfs_check(fd, map->path, &map->place, &map->fastfs);
    walk.end = map->size_bytes;
    walk.block_bytes = map->place.block_bytes ? map->place.block_bytes : 1;
    ret = fiemap_run(fd, &walk, true);
    if (ret == -EOPNOTSUPP)
        ret = seek_map(map, fd);
    if (ret < 0)
        err_set(err, ret, "%s: reading its extents: %s; check the disk below", map->path, strerror(-ret));
    else
        sum_up(map);
out:
    if (fd >= 0)
        close(fd);
    return ret;
}

// The bytes of each state that lie in [start, end), from extent *at on, which is moved along.
static struct cell cell_of(const struct file_map *map, uint64_t start, uint64_t end, size_t *at)
{
    uint64_t bytes[FILE_NR_STATES] = {0};
    struct cell cell = {FILE_HOLE, 0};

    // What ends in this cell may go on in the next: of a file with less bytes than cells they overlap.
    while (*at < map->nr_extents && map->extents[*at].start_bytes + map->extents[*at].len_bytes <= start)
        ++*at;
    for (size_t i = *at; i < map->nr_extents && map->extents[i].start_bytes < end; i++) {
        const struct file_extent *ext = &map->extents[i];
        uint64_t ext_end = ext->start_bytes + ext->len_bytes;

        bytes[ext->state] += min_of(end, ext_end) - max_of(start, ext->start_bytes);
        cell.nr_pieces += ext->state != FILE_HOLE;
    }
    for (unsigned i = 0; i < FILE_NR_STATES; i++) {
        if (bytes[i] > bytes[cell.state])
            cell.state = (enum file_state)i;
    }
    return cell;
}

static uint64_t cell_start(const struct file_map *map, unsigned i, unsigned nr_cells)
{
    return (uint64_t)((unsigned __int128)map->size_bytes * i / nr_cells);
}

static void size_text(uint64_t bytes, char text[32])
{
    static const char units[] = "KMGTPE";
    double n = (double)bytes;
    unsigned unit = 0;

    if (bytes < 1024) {
        snprintf(text, 32, "%" PRIu64 " bytes", bytes);
        return;
    }
    n /= 1024;
    while (n >= 1024) {
        n /= 1024;
        unit++;
    }
    snprintf(text, 32, n < 100 ? "%.1f %ciB" : "%.0f %ciB", n, units[unit]);
}

static uint64_t nr_pieces(const struct file_map *map)
{
    return map->nr_extents - map->sums[FILE_HOLE].nr_extents;
}

static void print_strip(const struct file_map *map)
{
    struct winsize size;
    bool is_tty = isatty(STDOUT_FILENO), has_colour = is_tty && !getenv("NO_COLOR");
    unsigned nr_cells = is_tty && !ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) && size.ws_col
                            ? min_of(size.ws_col, STRIP_MAX_CELLS)
                            : 72;
    size_t at = 0;

    for (unsigned i = 0; i < nr_cells && map->size_bytes; i++) {
        uint64_t start = cell_start(map, i, nr_cells), end = cell_start(map, i + 1, nr_cells);
        struct cell cell = cell_of(map, start, max_of(end, start + 1), &at);
        unsigned colour = states[cell.state].colour;

        if (cell.state == FILE_WRITTEN && cell.nr_pieces > 1)
            colour = cell.nr_pieces < FRAGMENTED ? 178 : 160; // yellow, red
        if (has_colour)
            printf("\033[38;5;%um%s", colour, states[cell.state].cell);
        else
            fputs(states[cell.state].cell, stdout);
    }
    puts(has_colour ? "\033[0m" : "");
}

static void print_text(const struct file_map *map)
{
    char size[32], least[32], most[32];

    size_text(map->size_bytes, size);
    printf("%s: %s, %" PRIu64 " extents%s%s\n", map->path, size, nr_pieces(map), map->place.fs ? " on " : "",
           map->place.fs ? map->place.fs : "");
    for (unsigned i = 0; i < FILE_NR_STATES; i++) {
        const struct state_sum *sum = &map->sums[i];

        if (!sum->nr_extents)
            continue;
        size_text(sum->bytes, size);
        size_text(sum->min_bytes, least);
        size_text(sum->max_bytes, most);
        printf("  %s %-10s %12s in %" PRIu64 ", from %s to %s\n", states[i].cell, states[i].name, size,
               sum->nr_extents, least, most);
    }
    print_strip(map);
    size_text(map->sums[FILE_WRITTEN].bytes, size);
    if (map->can_fastfs)
        printf("fastfs: could redirect %s in %" PRIu64 " extents to %s%s\n", size,
               map->sums[FILE_WRITTEN].nr_extents, map->place.device,
               map->size_bytes % map->place.block_bytes
                   ? "; for reading only: its size is no multiple of the file system's block"
                   : "");
    else
        printf("fastfs: no: %s\n", map->fastfs.line);
}

static int print_json(const struct file_map *map)
{
    struct json_object *top = json_object_new_object(), *sums = json_object_new_object(),
                       *list = json_object_new_array(), *fastfs = json_object_new_object();

    json_object_object_add(top, "image", json_object_new_string(map->path));
    json_object_object_add(top, "size_bytes", json_object_new_uint64(map->size_bytes));
    json_object_object_add(top, "nr_extents", json_object_new_uint64(nr_pieces(map)));
    for (unsigned i = 0; i < FILE_NR_STATES; i++) {
        struct json_object *sum = json_object_new_object();

        json_object_object_add(sum, "nr_extents", json_object_new_uint64(map->sums[i].nr_extents));
        json_object_object_add(sum, "bytes", json_object_new_uint64(map->sums[i].bytes));
        json_object_object_add(sum, "min_bytes", json_object_new_uint64(map->sums[i].min_bytes));
        json_object_object_add(sum, "max_bytes", json_object_new_uint64(map->sums[i].max_bytes));
        json_object_object_add(sums, states[i].name, sum);
    }
    json_object_object_add(top, "states", sums);
    json_object_object_add(fastfs, "possible", json_object_new_boolean(map->can_fastfs));
    if (map->can_fastfs) {
        json_object_object_add(fastfs, "file_system", json_object_new_string(map->place.fs));
        json_object_object_add(fastfs, "device", json_object_new_string(map->place.device));
        json_object_object_add(fastfs, "block_bytes", json_object_new_int64(map->place.block_bytes));
        json_object_object_add(fastfs, "bytes", json_object_new_uint64(map->sums[FILE_WRITTEN].bytes));
        json_object_object_add(fastfs, "nr_extents",
                               json_object_new_uint64(map->sums[FILE_WRITTEN].nr_extents));
    } else {
        json_object_object_add(fastfs, "reason", json_object_new_string(map->fastfs.line));
    }
    json_object_object_add(top, "fastfs", fastfs);
    for (size_t i = 0; i < map->nr_extents; i++) {
        const struct file_extent *ext = &map->extents[i];
        struct json_object *item = json_object_new_object();

        json_object_object_add(item, "start_bytes", json_object_new_uint64(ext->start_bytes));
        json_object_object_add(item, "len_bytes", json_object_new_uint64(ext->len_bytes));
        json_object_object_add(item, "state", json_object_new_string(states[ext->state].name));
        if (ext->state != FILE_HOLE && ext->state != FILE_OTHER)
            json_object_object_add(item, "physical_bytes", json_object_new_uint64(ext->physical_bytes));
        json_object_array_add(list, item);
    }
    json_object_object_add(top, "extents", list);
    ask_put_json(top);
    json_object_put(top);
    return 0;
}

// From green for one piece to red for many.
static void svg_written_shade(unsigned pieces, char shade[8])
{
    unsigned n = min_of(pieces ? pieces - 1 : 0, FRAGMENTED - 1);

    snprintf(shade, 8, "#%02x%02x30", 0x30 + 0xa0 * n / (FRAGMENTED - 1), 0xa0 - 0x80 * n / (FRAGMENTED - 1));
}

static void svg_text(FILE *file, const char *text)
{
    for (; *text; text++) {
        if (strchr("<>&\"", *text))
            fprintf(file, "&#%d;", *text);
        else if ((unsigned char)*text >= ' ')
            fputc(*text, file);
    }
}

static void write_svg(const struct file_map *map, FILE *file)
{
    unsigned nr_cells = SVG_COLUMNS * SVG_ROWS, height = SVG_ROWS * SVG_CELL;
    char size[32], shade[8];
    size_t at = 0;

    fprintf(file,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%u\" font-family=\"sans-serif\" "
            "font-size=\"12\">\n<title>",
            SVG_COLUMNS * SVG_CELL, height + 44);
    svg_text(file, map->path);
    fprintf(file, "</title>\n");
    for (unsigned i = 0; i < nr_cells && map->size_bytes; i++) {
        uint64_t start = cell_start(map, i, nr_cells), end = cell_start(map, i + 1, nr_cells);
        struct cell cell = cell_of(map, start, max_of(end, start + 1), &at);

        svg_written_shade(cell.nr_pieces, shade);
        fprintf(file, "<rect x=\"%u\" y=\"%u\" width=\"%d\" height=\"%d\" fill=\"%s\"/>\n",
                i % SVG_COLUMNS * SVG_CELL, i / SVG_COLUMNS * SVG_CELL, SVG_CELL - 1, SVG_CELL - 1,
                cell.state == FILE_WRITTEN ? shade : states[cell.state].shade);
    }
    size_text(map->size_bytes, size);
    fprintf(file, "<text x=\"0\" y=\"%u\">", height + 16);
    svg_text(file, map->path);
    fprintf(file, ": %s, %" PRIu64 " extents</text>\n", size, nr_pieces(map));
    for (unsigned i = 0; i < FILE_NR_STATES; i++) {
        unsigned x = i * 150;

        svg_written_shade(1, shade);
        size_text(map->sums[i].bytes, size);
        fprintf(file,
                "<rect x=\"%u\" y=\"%u\" width=\"10\" height=\"10\" fill=\"%s\"/><text x=\"%u\" y=\"%u\">%s "
                "%s</text>\n",
                x, height + 26, states[i].shade ? states[i].shade : shade, x + 14, height + 36,
                states[i].name, size);
    }
    fprintf(file, "</svg>\n");
}

static int save_svg(const struct file_map *map, struct err *err)
{
    FILE *file = fopen(map->svg, "we");
    int ret = 0;

    if (file)
        write_svg(map, file);
    if (!file || ferror(file))
        ret = -errno;
    if (file && fclose(file) && !ret)
        ret = -errno;
    return ret < 0 ? err_set(err, ret, "%s: writing the picture: %s", map->svg, strerror(-ret)) : 0;
}

// 0: go on. 1: help was asked for. A negative errno: usage.
static int parse(struct file_map *map, int argc, char **argv, struct err *err)
{
    int option;

    opterr = 0;
    while ((option = getopt_long(argc, argv, ":h", map_options, NULL)) != -1) {
        switch (option) {
        case 'j':
            map->is_json = true;
            break;
        case 's':
            map->svg = optarg;
            break;
        case 'h':
            return 1;
        case ':':
            return err_usage(err, "%s: needs a value; see bight map --help", argv[optind - 1]);
        default:
            return err_usage(err, "%s: no such option; see bight map --help", argv[optind - 1]);
        }
    }
    if (argc - optind != 1)
        return err_usage(err, "name one IMAGE; see bight map --help");
    map->path = argv[optind];
    return 0;
}

static int map_main(int argc, char **argv)
{
    struct file_map map = {.path = NULL};
    struct err err = {.line = ""};
    int ret = parse(&map, argc, argv, &err);

    if (ret > 0) {
        fputs(map_help, stdout);
        return CLI_OK;
    }
    if (!ret)
        ret = read_map(&map, &err);
    if (!ret && map.svg)
        ret = save_svg(&map, &err);
    if (!ret && map.is_json)
        ret = print_json(&map);
    else if (!ret)
        print_text(&map);
    free(map.extents);
    if (!ret && (fflush(stdout) || ferror(stdout)))
        ret = err_set(&err, -EIO, "standard output: %s", strerror(errno));
    if (ret < 0)
        log_line("%s", err.line);
    return ret < 0 ? (err.is_usage ? CLI_USAGE : CLI_ERROR) : CLI_OK;
}

const struct cli_command cli_map = {
    .name = "map",
    .summary = "show a file's extents",
    .help = map_help,
    .run = map_main,
};
