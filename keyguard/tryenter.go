package keyguard

// TryEnter is Enter without waiting: false means that the gate does not admit
// class now. Who has to do something before waiting asks this first.
func (g *Guard) TryEnter(class Class, lane uint32) (Pass, bool) {
	return g.gate.tryEnter(class, lane)
}
