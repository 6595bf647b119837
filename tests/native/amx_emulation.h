// The instructions of AMX that csrc/common/tiles.h uses, for CPUs without them; what the CPU would refuse ends the program.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Tile {
    int rows = 0, row_bytes = 0;
    unsigned char bytes[16][64] = {};
};

struct State {
    bool configured = false;
    Tile tiles[8];
};

inline thread_local State state;

inline void need(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "AMX: %s\n", what);
    std::abort();
}

inline Tile& tile(int index) {
    need(state.configured, "a tile is used before it has a shape");
    need(state.tiles[index].rows > 0, "a tile is used that has no shape");
    return state.tiles[index];
}

inline void configure(const void* from) {
    unsigned char raw[64];
    std::memcpy(raw, from, 64);
    need(raw[0] == 1 && raw[1] == 0, "the palette must be 1, the first row 0");
    for (int i = 2; i < 16; ++i) need(raw[i] == 0, "a reserved byte is not 0");
    state = {};
    for (int t = 0; t < 16; ++t) {
        const int row_bytes = raw[16 + 2 * t] | raw[17 + 2 * t] << 8, rows = raw[48 + t];
        need(t < 8 || (rows == 0 && row_bytes == 0), "there are 8 tiles");
        need(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0), "no tile has that shape");
        if (t < 8) state.tiles[t].rows = rows, state.tiles[t].row_bytes = row_bytes;
    }
    state.configured = true;
}

inline void load(int index, const void* from, int64_t stride) {
    Tile& t = tile(index);
    std::memset(t.bytes, 0, sizeof t.bytes);
    for (int r = 0; r < t.rows; ++r) std::memcpy(t.bytes[r], static_cast<const char*>(from) + r * stride, t.row_bytes);
}

inline void store(int index, void* to, int64_t stride) {
    const Tile& t = tile(index);
    for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, t.bytes[r], t.row_bytes);
}

/// sums += rows (unsigned) times columns (signed), four bytes at a time.
inline void multiply(int sums_index, int rows_index, int columns_index) {
    Tile& sums = tile(sums_index);
    const Tile &rows = tile(rows_index), &columns = tile(columns_index);
    need(sums_index != rows_index && sums_index != columns_index && rows_index != columns_index, "tiles must differ");
    need(rows.rows == sums.rows && columns.row_bytes == sums.row_bytes && rows.row_bytes == 4 * columns.rows &&
             rows.row_bytes % 4 == 0,
         "the shapes of a product do not agree");
    for (int r = 0; r < sums.rows; ++r)
        for (int c = 0; c < sums.row_bytes / 4; ++c) {
            int32_t sum;
            std::memcpy(&sum, sums.bytes[r] + 4 * c, 4);
            for (int j = 0; j < rows.row_bytes; ++j)
                sum += static_cast<int>(rows.bytes[r][j]) * static_cast<signed char>(columns.bytes[j / 4][4 * c + j % 4]);
            std::memcpy(sums.bytes[r] + 4 * c, &sum, 4);
        }
}

}  // namespace amx_emulation

#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig(from) amx_emulation::configure(from)
#define _tile_release() (amx_emulation::state = {})
#define _tile_loadd(index, from, stride) amx_emulation::load(index, from, stride)
#define _tile_stored(index, to, stride) amx_emulation::store(index, to, stride)
#define _tile_dpbusd(sums, rows, columns) amx_emulation::multiply(sums, rows, columns)
