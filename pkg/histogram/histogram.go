// Package histogram counts durations without a lock and without an allocation, and shows them to
// Prometheus as a native histogram and as a classic one.
package histogram

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// The buckets are those of Prometheus' native histograms with four to each doubling: bucket k holds
// what is longer than 2^((k-1)/4) and no longer than 2^(k/4) seconds. A classic bucket ends where a
// native one does, at a power of four, so that a duration is counted once for both.
const (
	schema      = 2
	perDoubling = 1 << schema

	// 2^-20 s, about a microsecond: what is no longer is in bucket 0 here
	least   = -20 * perDoubling
	most    = 12 * perDoubling // 2^12 s: what is longer is in the last bucket
	buckets = most - least + 1

	classicLeast, classicMost = -16, 6 // powers of two: 15 µs to 64 s
	classicStep               = 2
)

// bounds are the fractions of math.Frexp at which buckets end.
var bounds = [perDoubling]float64{0.5, math.Exp2(-0.75), math.Exp2(-0.5), math.Exp2(-0.25)}

// Histogram counts durations. The zero value is an empty one. Its methods are safe for concurrent
// use.
type Histogram struct {
	count [buckets]atomic.Uint64
	sum   atomic.Int64 // ns
}

// Observe counts d; less than nothing counts as nothing. It takes no lock and does not allocate.
func (h *Histogram) Observe(d time.Duration) {
	d = max(0, d)
	h.count[bucket(d)].Add(1)
	h.sum.Add(int64(d))
}

// bucket returns the index of d's bucket.
func bucket(d time.Duration) int {
	if d <= 0 {
		return 0
	}
	fraction, exp := math.Frexp(d.Seconds())
	key := (exp - 1) * perDoubling
	for _, b := range bounds {
		if fraction > b {
			key++
		}
	}
	return min(max(key-least, 0), buckets-1)
}

// Count returns how many durations were counted.
func (h *Histogram) Count() (n uint64) {
	for i := range h.count {
		n += h.count[i].Load()
	}
	return n
}

// Metric returns the histogram as it is now, with the labels that desc wants.
func (h *Histogram) Metric(desc *prometheus.Desc, labels ...string) prometheus.Metric {
	m := &metric{desc: desc, sum: time.Duration(h.sum.Load()).Seconds()}
	for i := range h.count {
		m.count[i] = h.count[i].Load()
	}
	m.labels = prometheus.MakeLabelPairs(desc, labels)
	return m
}

// metric is a histogram at one moment.
type metric struct {
	desc   *prometheus.Desc
	labels []*dto.LabelPair
	count  [buckets]uint64
	sum    float64
}

// Desc implements prometheus.Metric.
func (m *metric) Desc() *prometheus.Desc { return m.desc }

// Write implements prometheus.Metric.
func (m *metric) Write(out *dto.Metric) error {
	h := &dto.Histogram{
		SampleSum:     &m.sum,
		Schema:        new(int32(schema)),
		ZeroThreshold: new(math.Exp2(least / perDoubling)),
		ZeroCount:     &m.count[0],
	}
	var total uint64
	next := classicLeast
	last, lastKey := int64(0), 0
	for i, n := range m.count {
		total += n
		if key := i + least; key == next*perDoubling && next <= classicMost {
			h.Bucket = append(h.Bucket, &dto.Bucket{
				CumulativeCount: new(total),
				UpperBound:      new(math.Exp2(float64(next)))})
			next += classicStep
		}
		if i == 0 || n == 0 {
			continue
		}
		lastKey = span(h, i+least, lastKey)
		h.PositiveDelta = append(h.PositiveDelta, int64(n)-last)
		last = int64(n)
	}
	if len(h.PositiveSpan) == 0 { // tells an empty native histogram from a classic one
		h.PositiveSpan = []*dto.BucketSpan{{Offset: new(int32(0)), Length: new(uint32(0))}}
	}
	h.SampleCount = &total
	out.Label, out.Histogram = m.labels, h
	return nil
}

// span makes room for the bucket key, which comes after lastKey, in h's spans. It returns key.
func span(h *dto.Histogram, key, lastKey int) int {
	spans := len(h.PositiveSpan)
	switch {
	case spans == 0:
		h.PositiveSpan = append(h.PositiveSpan,
			&dto.BucketSpan{Offset: new(int32(key)), Length: new(uint32(1))})
	case key == lastKey+1:
		*h.PositiveSpan[spans-1].Length++
	default:
		h.PositiveSpan = append(h.PositiveSpan,
			&dto.BucketSpan{Offset: new(int32(key - lastKey - 1)),
				Length: new(uint32(1))})
	}
	return key
}
