package histogram

import (
	"math"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

var desc = prometheus.NewDesc("metad_test_seconds", "A test.", []string{"route"}, nil)

func written(t *testing.T, h *Histogram) *dto.Histogram {
	t.Helper()
	var m dto.Metric
	if err := h.Metric(desc, "/v2").Write(&m); err != nil {
		t.Fatal(err)
	}
	if len(m.Label) != 1 || m.Label[0].GetValue() != "/v2" {
		t.Errorf("labels: got %v", m.Label)
	}
	return m.Histogram
}

// A duration is in the bucket that Prometheus' own client puts it in, and in the classic bucket
// that ends there or later; counts and sum agree.
func TestAsPrometheusCounts(t *testing.T) {
	ours := new(Histogram)
	theirs := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x",
		NativeHistogramBucketFactor:  1.2,
		NativeHistogramZeroThreshold: math.Exp2(-20),
		Buckets:                      prometheus.ExponentialBuckets(math.Exp2(-16), 4, 12)})
	for _, d := range []time.Duration{0, 1, 953, 954, time.Microsecond, 15259, 15260,
		time.Millisecond, 62500 * time.Microsecond,
		62500*time.Microsecond + 1, time.Second, time.Second + 1, 3 * time.Second, 4 * time.Second, time.Minute, time.Hour} {
		ours.Observe(d)
		theirs.Observe(d.Seconds())
	}
	ours.Observe(-time.Second)
	theirs.Observe(0)
	var m dto.Metric
	if err := theirs.Write(&m); err != nil {
		t.Fatal(err)
	}
	got, want := written(t, ours), m.Histogram
	if got.GetSampleCount() != want.GetSampleCount() || ours.Count() != want.GetSampleCount() ||
		math.Abs(got.GetSampleSum()-want.GetSampleSum()) > 1e-6 {
		t.Errorf("got %d, %v, want %d, %v", got.GetSampleCount(), got.GetSampleSum(),
			want.GetSampleCount(), want.GetSampleSum())
	}
	if got.GetSchema() != want.GetSchema() || got.GetZeroCount() != want.GetZeroCount() ||
		got.GetZeroThreshold() != want.GetZeroThreshold() {
		t.Errorf("got schema %d, zero %d up to %v, want %d, %d, %v", got.GetSchema(),
			got.GetZeroCount(), got.GetZeroThreshold(),
			want.GetSchema(), want.GetZeroCount(), want.GetZeroThreshold())
	}
	if g, w := expand(got), expand(want); len(g) != len(w) {
		t.Errorf("got buckets %v, want %v", g, w)
	} else {
		for key, n := range w {
			if g[key] != n {
				t.Errorf("bucket %d: got %d, want %d", key, g[key], n)
			}
		}
	}
	if len(got.Bucket) != len(want.Bucket) {
		t.Fatalf("got %d classic buckets, want %d", len(got.Bucket), len(want.Bucket))
	}
	for i, b := range want.Bucket {
		if g := got.Bucket[i]; g.GetUpperBound() != b.GetUpperBound() ||
			g.GetCumulativeCount() != b.GetCumulativeCount() {
			t.Errorf("classic bucket: got %v, want %v", g, b)
		}
	}
}

// expand returns the counts of native buckets that are not zero, by key.
func expand(h *dto.Histogram) map[int]int64 {
	all := map[int]int64{}
	key, i, n := 0, 0, int64(0)
	for _, s := range h.PositiveSpan {
		key += int(s.GetOffset())
		for range s.GetLength() {
			n += h.PositiveDelta[i]
			if n != 0 {
				all[key] = n
			}
			key, i = key+1, i+1
		}
	}
	return all
}

// What is too long for any bucket is in the last one, and an empty histogram is still a native one.
func TestEnds(t *testing.T) {
	h := new(Histogram)
	if got := written(t, h); got.GetSampleCount() != 0 || len(got.PositiveSpan) != 1 {
		t.Errorf("empty: got %v", got)
	}
	h.Observe(math.MaxInt64)
	if got := expand(written(t, h)); got[most] != 1 {
		t.Errorf("got %v, want one in bucket %d", got, most)
	}
}

func TestObserveAllocs(t *testing.T) {
	h := new(Histogram)
	if n := testing.AllocsPerRun(100, func() { h.Observe(time.Millisecond) }); n != 0 {
		t.Errorf("got %v allocs, want 0", n)
	}
}

func BenchmarkObserve(b *testing.B) {
	h := new(Histogram)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			h.Observe(123 * time.Microsecond)
		}
	})
}
