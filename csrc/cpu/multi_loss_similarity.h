// SSIM's windows, a strip of rows at a time.
//
// Strips of as many rows as a vector has lanes go through five stages. Fields of the two images (s, d, s^2 and d^2, see
// ../multi_loss.h) are summed down the columns, turned, so that a vector holds the rows of one column, and summed across; the
// windows' derivatives follow, and go back across; turned again, they are summed down. A panel of a few columns passes through
// all stages before the next one is looked at, so that nothing leaves the first-level cache but what the next strip needs: the
// fields' and derivatives' rows around its edge, which wait in rings.
#pragma once

#include "../multi_loss_pixels.h"
#include "buffer.h"
#include "vector.h"

namespace lid {
namespace LID_ISA {
namespace {

// Rows of windows in a strip.
template <typename T>
constexpr int64_t kStrip = kVectorLanes<T>;

constexpr int64_t kLag = 16;     // columns that windows stay behind the fields: their width, in whole vectors

constexpr int kFields = 4, kMaps = 3;

// kStaged is the number of fields that are staged: all, or s and d, whose squares are taken whenever they are read.
template <typename T, int kStaged>
class Similarity {
 public:
  Similarity(const Plane<T>& plane, bool derivatives)
      : plane_(plane),
        derivatives_(derivatives),
        panels_((plane.width + kLag + kPanel - 1) / kPanel),  // until the last windows' derivatives have reached the last column
        fields_(panels_ * kStaged * kStride),
        maps_(derivatives ? panels_ * kMaps * kStride : 0),
        across_(kFields * (kLag + kPanel) * kRows),
        back_(kMaps * (kHalo + kPanel) * kRows) {}

  // To be called between the slices of a volume: above the first row there are no windows.
  void restart() { maps_.clear(); }

  // The fields of neighbouring pixels, of a row's `fields`.
  static void put(T* fields, int64_t column, const Vec<T> (&values)[kStaged]) {
    T* to = fields + column / kPanel * kStaged * kStride + column % kPanel;
    for (int f = 0; f < kStaged; ++f) values[f].store(to + f * kStride);
  }

  // Windows of the rows of strip k, whose sums are added to the two of `sums`; `fresh` where the strip before wasn't done.
  // `stage(row, fields)` hands all pixels of a row to `put`, `fetch(row, column)` asks the memory for what the next strip will
  // stage. With derivatives, `deliver(row, column, s, d,
  // mean, sum_square, difference_square)` gets the maps summed back for neighbouring pixels of the strip's row.
  template <typename Stage, typename Fetch, typename Deliver>
  void strip(int64_t k, bool fresh, const Stage& stage, const Fetch& fetch, double* sums, const Deliver& deliver) {
    const int64_t top = k * kRows;
    if (!derivatives_ && top + kHalo >= plane_.height) return;
    const int64_t first = fresh ? top : top + kHalo, last = std::min(top + kRows + kHalo, plane_.height);
    Vec<T> structural = Vec<T>::zero(), contrast = structural;
    back_.clear();
    for (int64_t row = first; row < last; ++row) stage(row, field(0, 0, row));
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t left = panel * kPanel;
      for (int64_t row = last; row < last + kRows; ++row) fetch(row, left);
      sum_down(top, panel);
      differentiate(top, left - kLag, structural, contrast);
      if (derivatives_) {
        sum_back(top, panel);
        sum_back_down(top, panel, deliver);
      }
      move_on(across_, kFields, kLag);
      move_on(back_, kMaps, kHalo);
    }
    sums[kStructural] += structural.sum();
    sums[kContrast] += contrast.sum();
  }

 private:
  static constexpr int kRows = kStrip<T>;
  static constexpr int64_t kPanel = 256 / kRows;  // columns
  // Rings are of whole strips: one, and those that its halo touches.
  static constexpr int kBlocks = 1 + (kHalo + kRows - 1) / kRows;
  static constexpr int64_t kRing = kBlocks * kRows;
  static constexpr int64_t kStride = (kRing + 1) * kPanel;  // not a power of two, which the cache's sets wouldn't spread

  T* field(int f, int64_t panel, int64_t row) { return fields_.data() + (panel * kStaged + f) * kStride + slot(row) * kPanel; }
  T* map(int m, int64_t panel, int64_t row) { return maps_.data() + (panel * kMaps + m) * kStride + slot(row) * kPanel; }
  static int64_t slot(int64_t row) { return (row + kRing) % kRing; }
  T* across(int f, int64_t column) { return across_.data() + (f * (kLag + kPanel) + column) * kRows; }
  T* back(int m, int64_t column) { return back_.data() + (m * (kHalo + kPanel) + column) * kRows; }

  // Down the columns of a panel, turned: vectors of rows, after the columns that are there already.
  void sum_down(int64_t top, int64_t panel) {
    for (int f = 0; f < kFields; ++f) {
      const T* blocks[kBlocks];
      for (int b = 0; b < kBlocks; ++b) blocks[b] = field(f % kStaged, panel, top + b * kRows);
      for (int64_t i = 0; i < kPanel; i += Vec<T>::kLanes) {
        const auto at = [&](int n) { return Vec<T>::load(blocks[n / kRows] + n % kRows * kPanel + i); };
        Vec<T> sums[kRows];
        if (f < kStaged) {
          window_sums<T>(at, sums);
        } else {
          window_sums<T>([&](int n) { return at(n) * at(n); }, sums);
        }
        transpose(sums);
        LID_UNROLL for (int j = 0; j < kRows; ++j) sums[j].store(across(f, kLag + i + j));
      }
    }
  }

  // The windows whose first column is `left` and after, and their derivatives; zeros for those that leave the image.
  void differentiate(int64_t top, int64_t left, Vec<T>& structural, Vec<T>& contrast) {
    const int64_t windows = plane_.width - kHalo, rows = plane_.height - kHalo - top;
    for (int64_t i = 0; i < kPanel; i += kRows) {
      T means[kFields][kRows * kRows];
      for (int f = 0; f < kFields; ++f) {
        Vec<T> sums[kRows];
        const T* from = across(f, i);
        window_sums<T>([&](int n) { return Vec<T>::load(from + n * kRows); }, sums);
        LID_UNROLL for (int j = 0; j < kRows; ++j) sums[j].store(means[f] + j * kRows);
      }
      for (int64_t j = 0; j < kRows; ++j) {
        WindowDerivatives<Vec<T>> slopes{Vec<T>::zero(), Vec<T>::zero(), Vec<T>::zero()};
        if (left + i + j >= 0 && left + i + j < windows) {
          const auto mean = [&](int f) { return Vec<T>::load(means[f] + j * kRows); };
          const WindowMeans<Vec<T>> window{mean(0), mean(1), mean(2), mean(3)};
          const Dissimilarity<Vec<T>> found = dissimilarity(window, plane_.constants);
          Vec<T> of_structure = found.structural(), of_contrast = found.contrast;
          if (derivatives_) slopes = derivatives(window, found, plane_.structural_weight, plane_.contrast_weight);
          if (rows < kRows) {
            for (Vec<T>* value : {&of_structure, &of_contrast, &slopes.mean, &slopes.sum_square, &slopes.difference_square}) {
              *value = value->keep(rows);
            }
          }
          structural = structural + of_structure;
          contrast = contrast + of_contrast;
        }
        slopes.mean.store(back(0, kHalo + i + j));
        slopes.sum_square.store(back(1, kHalo + i + j));
        slopes.difference_square.store(back(2, kHalo + i + j));
      }
    }
  }

  // Back across and turned: the panel of the maps' rows that lags behind.
  void sum_back(int64_t top, int64_t panel) {
    for (int m = 0; m < kMaps; ++m) {
      T* rows = map(m, panel, top);
      for (int64_t i = 0; i < kPanel; i += kRows) {
        Vec<T> sums[kRows];
        const T* from = back(m, i);
        window_sums<T>([&](int n) { return Vec<T>::load(from + n * kRows); }, sums);
        transpose(sums);
        LID_UNROLL for (int j = 0; j < kRows; ++j) sums[j].store(rows + j * kPanel + i);
      }
    }
  }

  template <typename Deliver>
  void sum_back_down(int64_t top, int64_t panel, const Deliver& deliver) {
    constexpr int kFirst = (kBlocks - 1) * kRows - kHalo;  // of the rows in the first block
    for (int64_t i = 0; i < kPanel; i += Vec<T>::kLanes) {
      const int64_t column = panel * kPanel - kLag + i;
      if (column < 0 || column >= plane_.width) continue;
      T maps[kMaps][kRows * kRows];
      for (int m = 0; m < kMaps; ++m) {
        const T* blocks[kBlocks];
        for (int b = 0; b < kBlocks; ++b) blocks[b] = map(m, panel, top + (b + 1 - kBlocks) * kRows) + i;
        Vec<T> sums[kRows];
        window_sums<T>(
            [&](int n) { return Vec<T>::load(blocks[(kFirst + n) / kRows] + (kFirst + n) % kRows * kPanel); }, sums);
        LID_UNROLL for (int j = 0; j < kRows; ++j) sums[j].store(maps[m] + j * kRows);
      }
      const T *s = field(0, column / kPanel, top) + column % kPanel, *d = field(1, column / kPanel, top) + column % kPanel;
      for (int64_t j = 0; j < kRows; ++j) {
        const auto at = [&](int m) { return Vec<T>::load(maps[m] + j * kRows); };
        deliver(j, column, Vec<T>::load(s + j * kPanel), Vec<T>::load(d + j * kPanel), at(0), at(1), at(2));
      }
    }
  }

  // The last columns become the first.
  static void move_on(Buffer<T>& columns, int of, int64_t kept) {
    for (int f = 0; f < of; ++f) {
      T* first = columns.data() + f * (kept + kPanel) * kRows;
      std::memmove(first, first + kPanel * kRows, kept * kRows * sizeof(T));
    }
  }

  const Plane<T>& plane_;
  const bool derivatives_;
  const int64_t panels_;
  Buffer<T> fields_, maps_, across_, back_;
};

}  // namespace
}  // namespace LID_ISA
}  // namespace lid
