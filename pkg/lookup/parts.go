package lookup

import (
	"iter"
	"maps"
	"net/netip"
)

// parts is a map in parts. A change makes the next map, which shares all unchanged parts with the
// last one, so that the cost of a change hardly depends on the size. The zero value is empty.
//
// A published map must not be changed. Reading does not allocate.
type parts[K comparable, V any] struct {
	maps [partCount]map[K]V
	own  uint64 // bits of the parts that no other map shares
}

const partCount = 64 // the bits of own

// next returns a copy to be changed.
func (p *parts[K, V]) next() parts[K, V] { return parts[K, V]{maps: p.maps} }

// set puts v at k, which is in the given part.
func (p *parts[K, V]) set(part int, k K, v V) {
	p.take(part)[k] = v
}

// delete removes k, which is in the given part if it is there.
func (p *parts[K, V]) delete(part int, k K) {
	if _, ok := p.maps[part][k]; ok {
		delete(p.take(part), k)
	}
}

// take returns a part that is not shared, and may be changed.
func (p *parts[K, V]) take(part int) map[K]V {
	if p.own&(1<<part) == 0 {
		if p.maps[part] = maps.Clone(p.maps[part]); p.maps[part] == nil {
			p.maps[part] = map[K]V{}
		}
		p.own |= 1 << part
	}
	return p.maps[part]
}

// all yields all entries, in no order.
func (p *parts[K, V]) all() iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for _, m := range p.maps {
			for k, v := range m {
				if !yield(k, v) {
					return
				}
			}
		}
	}
}

// Which part a key is in.

func tagPart(tag uint32) int { return int(tag % partCount) }

func addrPart(a netip.Addr) int {
	b := a.As16()
	return int(b[15]^b[14]) % partCount
}

func idPart[T string | []byte](id T) int {
	h := uint(0)
	for i := max(0, len(id)-16); i < len(id); i++ {
		h = h*31 + uint(id[i])
	}
	return int(h % partCount)
}
