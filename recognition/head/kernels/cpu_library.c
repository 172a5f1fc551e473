/* What cpu_library.py does in one pass over memory where torch takes several.

   REAL is float or double. Pieces and tables are dense; `index` says which rows of a table take
   part, NULL: its first n. B rows of the batch, n classes, D numbers of a centre. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

typedef REAL real;

#define EACH _Pragma("omp parallel for num_threads(threads) schedule(static) if (threads > 1)")

/* e^x to two roundings for |x| <= 87, 0 below, infinite from 88 on, with no branch: loops over it
   become vectors. 2^k e^r with |r| <= ln 2 / 2; what follows r^7 in the series is below 6e-9. */
static inline float exp_float(float x)
{
    float within = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float k = nearbyintf(within * 1.44269504f);
    float r = (within - k * 0.693145752f) - k * 1.42860677e-6f; /* ln 2 in two parts */
    float sum = 1.98412698e-4f;
    sum = sum * r + 1.38888889e-3f;
    sum = sum * r + 8.33333333e-3f;
    sum = sum * r + 4.16666667e-2f;
    sum = sum * r + 1.66666667e-1f;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    union { uint32_t bits; float number; } power = { (uint32_t)((int32_t)k + 127) << 23 };
    float e = sum * power.number;
    return x < -87.0f ? 0.0f : x > 88.0f ? INFINITY : e;
}

#define EXP(x) (sizeof(real) == sizeof(float) ? (real)exp_float((float)(x)) : (real)exp(x))

/* out = those rows [n, D], inverse [n] = 1 / |w|, never 0: where |w| <= tiny it counts as 1, and
   where it is infinite as the largest number. out NULL: the rows stay where they are. */
void read_rows(const real *restrict table, const int64_t *restrict index, int64_t n, int64_t D,
               real tiny, real largest, real *restrict out, real *restrict inverse, int threads)
{
    EACH for (int64_t i = 0; i < n; i++) {
        const real *restrict w = table + (index ? index[i] : i) * D;
        real sum = 0;
        if (out) {
            real *restrict copy = out + i * D;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < D; j++) {
                copy[j] = w[j];
                sum += w[j] * w[j];
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < D; j++) sum += w[j] * w[j];
        }
        real norm = (real)sqrt(sum);
        norm = norm > largest ? largest : norm;
        inverse[i] = 1 / (norm > tiny ? norm : 1);
    }
}

/* z [B, n] = -inf at m places */
void leave_out(real *restrict z, const int64_t *restrict row, const int64_t *restrict column,
               int64_t m, int64_t n, int threads)
{
    (void)threads; /* they are few */
    for (int64_t i = 0; i < m; i++) z[row[i] * n + column[i]] = -INFINITY;
}

/* mass [B] = sum over n of e^(z / |w|) */
void sum_exp(const real *restrict z, const real *restrict inverse, int64_t B, int64_t n,
             real *restrict mass, int threads)
{
    EACH for (int64_t b = 0; b < B; b++) {
        const real *restrict row = z + b * n;
        real sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) sum += EXP(row[j] * inverse[j]);
        mass[b] = sum;
    }
}

/* With c = z / |w| and e = e^c: radial [n] = sum over b of along[b] c e, and z becomes e / |w|. A
   thread has some columns, of all rows. */
void slopes(real *restrict z, const real *restrict inverse, const real *restrict along, int64_t B,
            int64_t n, real *restrict radial, int threads)
{
    int64_t width = (n + threads - 1) / threads;
    EACH for (int64_t part = 0; part < threads; part++) {
        int64_t first = part * width, last = first + width < n ? first + width : n;
        for (int64_t j = first; j < last; j++) radial[j] = 0;
        for (int64_t b = 0; b < B; b++) {
            real *restrict row = z + b * n, share = along[b];
#pragma omp simd
            for (int64_t j = first; j < last; j++) {
                real c = row[j] * inverse[j], e = EXP(c);
                radial[j] += e == 0 ? 0 : c * e * share; /* c may be -inf */
                row[j] = e * inverse[j];
            }
        }
    }
}

/* Rows of K centres: v = momentum v + g - radial w + decay w;  w = w - lr v.
   radial [n * K] or NULL; velocity NULL: v is not kept. */
void sgd(real *restrict weight, real *restrict velocity, const real *restrict grad,
         const real *restrict radial, const int64_t *restrict index, int64_t n, int64_t K,
         int64_t D, real lr, real momentum, real decay, int threads)
{
    EACH for (int64_t i = 0; i < n * K; i++) {
        int64_t row = (index ? index[i / K] : i / K) * K + i % K;
        const real *restrict g = grad + i * D;
        real *restrict w = weight + row * D, pull = decay - (radial ? radial[i] : 0);
        if (velocity) {
            real *restrict v = velocity + row * D;
            for (int64_t j = 0; j < D; j++) {
                v[j] = momentum * v[j] + (g[j] + pull * w[j]);
                w[j] -= lr * v[j];
            }
        } else {
            for (int64_t j = 0; j < D; j++) w[j] -= lr * (g[j] + pull * w[j]);
        }
    }
}
