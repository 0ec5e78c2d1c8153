// How generated kernels walk: all weights of a bucket as one list of tasks, shared out to threads in groups.
//
// Tasks depend on shapes alone, and so does the order in which their partial results are put together: the result is
// the same for any number of threads.

// What runs once a weight, a task or a row stands here, once for all passes: copied to each of them, it would take the
// compiler longer than their loops do. So bodies of loops are called by their addresses, and never become part of what
// calls them: inside of a function that has grown large gcc gives up vectorising them.
#define ONCE __attribute__((noinline))

namespace piste {

const int64_t CHUNK = 16384;   // elements of a task
const int64_t SHARE = 32768;   // elements for which a thread is worth waking
const int64_t GROUP = 262144;  // elements that a thread takes at a time, or less where that leaves threads idle
const int64_t BLOCK = 256;     // codes that share a word, or a multiple of them
const int64_t RUN = 512;       // terms of a sum that are added before it goes on in double
const int64_t HALVED = 256;    // elements for which a loop in two halves keeps what the second needs of the first
const int64_t ROWS = 32;       // rows, likewise
const int64_t SLOTS = 32;      // tasks of a weight whose axes matter
const int MAX_RANK = 8;

struct Group { int64_t task, weight; };
struct Tasks;

// What a call of a kernel was given, and what its threads share.
struct Call {
  const int64_t* T;
  int64_t n;
  int axes;
  const double* hp;
  int64_t hyper;
  const Tasks* tasks;
  double* parts;
  const void* shares;
};

// does the tasks up to `end`, of which the first is of weight w
typedef void (*Work)(const Call& call, int64_t task, int64_t end, int64_t w);

static INLINE int64_t chunks(int64_t size) { return (size + CHUNK - 1) / CHUNK; }

// The tasks of all weights, numbered through.
struct Tasks {
  int64_t n, threads, count = 0, groups = 0;
  int64_t* first;  // of each weight; one more at the end
  Group* group;

  // `size` elements per weight, cut into `pieces` tasks, or into chunks where that is null
  ONCE Tasks(int64_t n, int64_t most, const int64_t* size, const int64_t* pieces) : n(n) {
    int64_t elements = 0;
    first = (int64_t*)malloc((n + 1) * sizeof(int64_t));
    for (int64_t w = 0; w < n; ++w)
      first[w] = count, count += pieces ? pieces[w] : chunks(size[w]), elements += size[w];
    first[n] = count;
    threads = elements / SHARE < most ? elements / SHARE : most;
    int64_t share = threads > 1 ? elements / (8 * threads) : elements;
    share = share < SHARE ? SHARE : share < GROUP ? share : GROUP;
    group = (Group*)malloc((count + 1) * sizeof(Group));
    int64_t gathered = share;
    for (int64_t w = 0; w < n; ++w)
      for (int64_t task = first[w]; task < first[w + 1]; ++task) {
        if (gathered >= share) group[groups++] = {task, w}, gathered = 0;
        gathered += size[w] / (first[w + 1] - first[w]) + 64;  // a task costs something even when it is small
      }
    group[groups] = {count, n};
  }
  ~Tasks() { free(first), free(group); }

  ONCE void run(Work work, const Call& call) const {
    if (threads > 1) {
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 1)
      for (int64_t g = 0; g < groups; ++g) work(call, group[g].task, group[g + 1].task, group[g].weight);
    } else {
      for (int64_t g = 0; g < groups; ++g) work(call, group[g].task, group[g + 1].task, group[g].weight);
    }
  }
};

// Partial results of tasks, `each` of them per task: where they begin, and one of them put together over some tasks.
static ONCE double* begun(int64_t tasks, int each, const bool* peak) {
  double* parts = (double*)malloc((tasks + 1) * each * sizeof(double));
  for (int64_t i = 0; i < tasks * each; ++i) parts[i] = peak[i % each] ? -__builtin_inf() : 0;
  return parts;
}

static ONCE double joined(const double* parts, int64_t from, int64_t to, int each, int place, bool peak) {
  double value = peak ? -__builtin_inf() : 0;
  for (int64_t task = from; task < to; ++task) {
    const double part = parts[task * each + place];
    value = peak ? maximum(value, part) : value + part;
  }
  return value;
}

static inline double product(const int64_t* shape, int64_t n, int axes) {
  double all = 1;
  for (int a = 0; a < axes; ++a) all *= (double)shape[a * n];
  return all;
}

// The first element of the block of codes that an element is in. Blocks begin anew in each row.
static INLINE int64_t begin_of_block(int64_t at, int64_t row) { return at - at % row % BLOCK; }

// Sums over rows that lie side by side: a few rows in the precision of the numbers, and then in double.
template <class Real> struct RowSum {
  Real* row;
  double* share;
  int axes;  // the choice of axes that the sum keeps
  int64_t at = -1, length = 0, held = 0;

  ONCE RowSum(int64_t longest, double* share, int axes)
      : row((Real*)calloc(longest + 1, sizeof(Real))), share(share), axes(axes) {}
  ONCE ~RowSum() { flush(), free(row); }

  // the next rows belong to the elements from k on
  INLINE void take(int64_t k, int64_t n, int64_t rows) {
    if (k != at || n != length || held + rows > ROWS) flush(), at = k, length = n;
    held += rows;
  }

  ONCE void flush() {
    for (int64_t i = 0; held > 0 && i < length; ++i) share[at + i] += row[i], row[i] = 0;
    held = 0;
  }
};

// What a loop works on, besides the numbers and its place there.
template <class Real> struct Place {
  const int64_t* T;
  int64_t n, w;
  double* part;                     // results of the whole task
  double** share = nullptr;         // ... and those that keep axes
  const int64_t* s = nullptr;       // how each choice of axes goes along the innermost one
  RowSum<Real>* const* sum = nullptr;
  int sums = 0;
  Real** rows = nullptr;            // where the sums are
  void* tile = nullptr;             // decoded numbers, from element `base` on
  int64_t base = 0;
};

// One run of elements from `at` on, or several that begin `across` and `next` behind each other; k is where each choice
// of axes begins. Nothing that is written lies among the numbers h.
template <class Real>
using Body = void (*)(const Place<Real>& here, const Real* __restrict h, int64_t at, int64_t length, const int64_t* k,
                      int64_t across, const int64_t* next);

// Shapes and strides of all weights, in a table with one column an axis, and the choices of axes that a pass tells apart.
// Without strides the order of axes is that of memory, and what is walked has the axes `within` only.
struct Space {
  const int64_t* table;
  bool strides, tiled;  // tiled: slots begin at whole blocks of codes, wherever that is in a row
  int64_t within, n;
  int axes;
  const int* keep;
};

// A weight as nested loops in the order of memory. Axes are merged where nothing tells them apart. `K` choices of axes
// are followed: for each, where the current element lies in a tensor that has these axes only.
template <int K> struct Grid {
  int rank = 0, split = 0;
  int64_t size[MAX_RANK + 1], step[MAX_RANK + 1][K], extent[K], slots, numel = 1;
  bool tiled;

  ONCE Grid(const Space& space, int64_t w) : tiled(space.tiled) {
    const int axes = space.axes, *keep = space.keep;
    const int64_t* table = space.table + w;
    int64_t shape[MAX_RANK], stride[MAX_RANK];
    for (int a = 0; a < axes; ++a) {
      shape[a] = space.within >> a & 1 ? table[a * space.n] : 1;
      stride[a] = space.strides ? table[(axes + a) * space.n] : axes - a;
    }
    int order[MAX_RANK], found = 0;
    for (int a = 0; a < axes; ++a) {
      if (shape[a] == 1) continue;
      int at = found++;
      for (; at > 0 && stride[order[at - 1]] < stride[a]; --at) order[at] = order[at - 1];
      order[at] = a;
    }
    int64_t inside[MAX_RANK][K];
    for (int j = 0; j < K; ++j) {
      extent[j] = 1;
      for (int a = axes - 1; a >= 0; --a) {
        const bool kept = keep[j] >> a & 1;
        inside[a][j] = kept ? extent[j] : 0;
        if (kept) extent[j] *= shape[a];
      }
    }
    for (int d = 0; d < found; ++d) {
      const int a = order[d];
      const int64_t here = shape[a];
      bool merge = rank > 0;
      for (int j = 0; j < K; ++j) merge = merge && step[rank - 1][j] == inside[a][j] * here;
      if (!merge) size[rank++] = 1;
      size[rank - 1] *= here;
      for (int j = 0; j < K; ++j) step[rank - 1][j] = inside[a][j];
      numel *= here;
    }
    if (rank == 0) {
      size[rank++] = 1;
      for (int j = 0; j < K; ++j) step[0][j] = 0;
    }
    slots = chunks(numel) < SLOTS ? chunks(numel) : SLOTS;
    if (tiled) return;
    // the outermost axis that is long enough, so that a slot is one stretch of memory; else the longest
    while (split < rank && size[split] < slots) ++split;
    if (split == rank) split = longest();
    if (slots > size[split]) slots = size[split];
  }

  int longest() const {
    int found = 0;
    for (int d = 1; d < rank; ++d)
      if (size[d] > size[found]) found = d;
    return found;
  }

  // does each slot have elements of its own in a tensor with the axes j?
  bool own(int j) const { return slots == 1 || (!tiled && step[split][j] != 0); }

  // where a slot begins in the order of memory, more or less
  int64_t edge(int64_t slot) const { return numel * slot / slots; }

  // `row` for every run along the innermost axis, of the elements from low to high
  template <class Real>
  ONCE void stretch(int64_t low, int64_t high, const Place<Real>& here, const Real* h, Body<Real> row) const {
    const int last = rank - 1;
    int64_t index[MAX_RANK + 1], left = low;
    for (int d = last; d >= 0; --d) index[d] = left % size[d], left /= size[d];
    for (int64_t at = low; at < high;) {
      int64_t offset[K], length = size[last] - index[last];
      if (length > high - at) length = high - at;
      for (int j = 0; j < K; ++j) {
        offset[j] = 0;
        for (int d = 0; d < rank; ++d) offset[j] += index[d] * step[d][j];
      }
      take(here, offset, length, 1);
      row(here, h, at, length, offset, 0, nullptr);
      at += length;
      index[last] = 0;
      for (int d = last - 1; d >= 0 && ++index[d] == size[d]; --d) index[d] = 0;
    }
  }

  // `row` for every run along the innermost axis of a slot, and `group` for so many runs at once, where they are more than
  // one, that lie side by side
  template <class Real>
  ONCE void walk(int64_t slot, const Place<Real>& here, const Real* h, Body<Real> row, Body<Real> group = nullptr,
                 int64_t rows = 1) const {
    const int64_t low = size[split] * slot / slots, high = size[split] * (slot + 1) / slots;
    const int last = rank - 1;
    int64_t index[MAX_RANK + 1];
    for (int d = 0; d < rank; ++d) index[d] = d == split ? low : 0;
    for (;;) {
      int64_t at = 0, offset[K];
      for (int d = 0; d < rank; ++d) at = at * size[d] + index[d];
      for (int j = 0; j < K; ++j) {
        offset[j] = 0;
        for (int d = 0; d < rank; ++d) offset[j] += index[d] * step[d][j];
      }
      const int64_t length = (last == split ? high : size[last]) - index[last];
      if (rows > 1 && index[last - 1] + rows <= (last - 1 == split ? high : size[last - 1])) {
        take(here, offset, length, rows);
        group(here, h, at, length, offset, size[last], step[last - 1]);
        index[last - 1] += rows - 1;
      } else {
        take(here, offset, length, 1);
        row(here, h, at, length, offset, 0, nullptr);
      }
      int d = last - 1;
      for (; d >= 0; --d) {
        if (++index[d] < (d == split ? high : size[d])) break;
        index[d] = d == split ? low : 0;
      }
      if (d < 0) return;
    }
  }

  template <class Real>
  static INLINE void take(const Place<Real>& here, const int64_t* offset, int64_t length, int64_t rows) {
    for (int j = 0; j < here.sums; ++j)
      if (here.s[here.sum[j]->axes] == 1) here.sum[j]->take(offset[here.sum[j]->axes], length, rows);
  }

  // do runs that lie side by side meet the same elements of a tensor with the axes j, if they go along it?
  bool shared(int j) const { return step[rank - 1][j] == 0 || step[rank - 2][j] == 0; }
};

// Into how many tasks each weight is cut; to be freed.
template <int K> static ONCE int64_t* pieces(const Space& space) {
  int64_t* slots = (int64_t*)malloc((space.n + 1) * sizeof(int64_t));
  for (int64_t w = 0; w < space.n; ++w) slots[w] = Grid<K>(space, w).slots;
  return slots;
}

// Partial results that keep axes, of all weights: one buffer per weight and reduction where slots have elements of their
// own, else one per slot. Sums are doubles; peaks, which are numbers that were there, are of their type.
template <class Real, int K> struct Shares {
  const Space& space;
  const int count, *axes_of;  // reduction r keeps the axes of choice axes_of[r]
  const bool* peak;
  int64_t* offset;  // of weight w and reduction r
  double* data;

  ONCE Shares(const Space& space, int count, const int* axes_of, const bool* peak)
      : space(space), count(count), axes_of(axes_of), peak(peak) {
    const int64_t n = space.n;
    offset = (int64_t*)malloc((n * count + 1) * sizeof(int64_t));
    int64_t size = 0;
    for (int64_t w = 0; w < n; ++w) {
      const Grid<K> grid(space, w);
      for (int r = 0; r < count; ++r)
        offset[w * count + r] = size, size += grid.extent[axes_of[r]] * copies(grid, axes_of[r]);
    }
    offset[n * count] = size;
    data = (double*)malloc((size + 1) * sizeof(double));
    for (int64_t x = 0; x < n * count; ++x)
      for (int64_t i = offset[x]; i < offset[x + 1]; ++i)
        if (peak[x % count])
          ((Real*)(data + i))[0] = ((Real*)(data + i))[sizeof(double) / sizeof(Real) - 1] = (Real)-__builtin_inf();
        else
          data[i] = 0;
  }
  ~Shares() { free(offset), free(data); }

  // one even of a weight without elements, whose results are where they began
  static int64_t copies(const Grid<K>& grid, int j) { return grid.own(j) || !grid.slots ? 1 : grid.slots; }

  double* of(const Grid<K>& grid, int64_t w, int r, int64_t slot) const {
    const int j = axes_of[r];
    return data + offset[w * count + r] + (grid.own(j) ? 0 : slot * grid.extent[j]);
  }

  // puts them together where the columns of the table say
  ONCE void finish(const int64_t* T, const int* column) const {
    for (int64_t w = 0; w < space.n; ++w) {
      const Grid<K> grid(space, w);
      for (int r = 0; r < count; ++r) {
        const int64_t extent = grid.extent[axes_of[r]], more = copies(grid, axes_of[r]);
        const double* from = data + offset[w * count + r];
        Real* out = (Real*)T[column[r] * space.n + w];
        for (int64_t i = 0; i < extent; ++i) {
          double value = at(from, r, i);
          for (int64_t c = 1; c < more; ++c) {
            const double other = at(from + c * extent, r, i);
            value = peak[r] ? maximum(value, other) : value + other;
          }
          out[i] = (Real)value;
        }
      }
    }
  }

  double at(const double* from, int r, int64_t i) const { return peak[r] ? (double)((const Real*)from)[i] : from[i]; }
};

struct Add { double operator()(double x, double y) const { return x + y; } };
struct Peak { double operator()(double x, double y) const { return maximum(x, y); } };

}  // namespace piste
