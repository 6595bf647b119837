// AMX: products of byte matrices, 16 rows by 16 columns by up to 64 features at a time, sixteen times the rate of vpdpbusd.
//
// The registers:  0: rows, unsigned (16, 4 steps) bytes   1, 2: columns, signed (steps, 16, 4) bytes   4 .. 7: sums (16, 16)
// Their shapes belong to the thread; Tiles sets them. Only what is compiled for AMX includes this, and the tests, which
// emulate the instructions.
#pragma once

#include <cstdint>

#ifdef FASTCLUST_EMULATE_AMX
#include "amx_emulation.h"
#else
#include "common/intrinsics.h"
#endif

namespace fastclust::tiles::FASTCLUST_CAPABILITY {

constexpr int kRows = 16;
constexpr int kWidth = 16;      // columns
constexpr int kMostSteps = 16;  // of four features

/// Steps that a tile takes at once where `count` are to be taken: as few turns as can be, all of one length.
inline int64_t steps_at_once(int64_t count) {
    const int64_t turns = (count + kMostSteps - 1) / kMostSteps;
    return (count + turns - 1) / turns;
}

/// While it lives, its thread's tiles are shaped for products over `count` steps.
class Tiles {
   public:
    explicit Tiles(int64_t count) {
        const auto steps = static_cast<uint8_t>(steps_at_once(count));
        Shapes shapes;
        for (int sums = 4; sums < 8; ++sums) shapes.set(sums, kRows, kWidth * 4);
        for (int columns = 1; columns < 3; ++columns) shapes.set(columns, steps, kWidth * 4);
        shapes.set(0, kRows, static_cast<uint16_t>(steps * 4));
        written(&shapes);
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    /// What is at `from`, and all else, is in memory before what follows: the compiler does not see what tiles read.
    static void written(const void* from) { asm volatile("" : : "r"(from) : "memory"); }

   private:
    struct alignas(64) Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};

        void set(int tile, uint8_t row_count, uint16_t bytes) { rows[tile] = row_count, row_bytes[tile] = bytes; }
    };
    static_assert(sizeof(Shapes) == 64);
};

/// The products of 16 rows with Panels times 16 columns over `count` steps, a multiple of steps_at_once:
///     out[row * ld + panel * 16 + lane] = start[panel * 16 + lane] + sum_j rows[row][j] panels[panel][j / 4][lane][j % 4]
/// Steps of a panel are step_bytes apart, panels panel_bytes.
template <int Panels>
inline void multiply(const uint8_t* rows, const uint8_t* panels, int64_t step_bytes, int64_t panel_bytes, int64_t count,
                     const int32_t* start, int32_t* out, int64_t ld) {
    static_assert(Panels <= 4);
    const int64_t at_once = steps_at_once(count);
    Tiles::written(rows);
    _tile_loadd(4, start, 0);  // each row of the sums begins alike
    if constexpr (Panels > 1) _tile_loadd(5, start + kWidth, 0);
    if constexpr (Panels > 2) _tile_loadd(6, start + 2 * kWidth, 0);
    if constexpr (Panels > 3) _tile_loadd(7, start + 3 * kWidth, 0);
    for (int64_t step = 0; step < count; step += at_once, panels += at_once * step_bytes) {
        _tile_loadd(0, rows + step * 4, count * 4);
        _tile_loadd(1, panels, step_bytes);
        _tile_dpbusd(4, 0, 1);
        if constexpr (Panels > 1) {
            _tile_loadd(2, panels + panel_bytes, step_bytes);
            _tile_dpbusd(5, 0, 2);
        }
        if constexpr (Panels > 2) {
            _tile_loadd(1, panels + 2 * panel_bytes, step_bytes);
            _tile_dpbusd(6, 0, 1);
        }
        if constexpr (Panels > 3) {
            _tile_loadd(2, panels + 3 * panel_bytes, step_bytes);
            _tile_dpbusd(7, 0, 2);
        }
    }
    _tile_stored(4, out, ld * 4);
    if constexpr (Panels > 1) _tile_stored(5, out + kWidth, ld * 4);
    if constexpr (Panels > 2) _tile_stored(6, out + 2 * kWidth, ld * 4);
    if constexpr (Panels > 3) _tile_stored(7, out + 3 * kWidth, ld * 4);
}

}  // namespace fastclust::tiles::FASTCLUST_CAPABILITY
