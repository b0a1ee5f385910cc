package inject

// Outcome is what became of a creation that metad could put something into.
type Outcome int

// Outcomes of a creation.
const (
	Changed   Outcome = iota // the container has what metad adds
	Unchanged                // there was nothing to add
	// the container lacks something that it should have; the log says why
	Without
	Refused // the Engine created no container

	outcomes
)

func (o Outcome) String() string {
	return [...]string{"changed", "unchanged", "without", "refused"}[o]
}

// Creations are the creations of one way and outcome since the start.
type Creations struct {
	Way     string // WayProxy or WayNRI
	Outcome Outcome
	Count   uint64
}

var ways = [...]string{WayProxy, WayNRI}

// Count counts a creation.
func (i *Injector) Count(way string, o Outcome) {
	for n, w := range ways {
		if w == way {
			i.creations[n][o].Add(1)
		}
	}
}

// Creations returns every count.
func (i *Injector) Creations() (all []Creations) {
	for n, w := range ways {
		for o := range outcomes {
			all = append(all, Creations{w, o, i.creations[n][o].Load()})
		}
	}
	return all
}
