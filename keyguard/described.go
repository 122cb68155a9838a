package keyguard

import "strings"

// What DescribeKey tells of a failure: the transitions that follow it (transition.go has the others).

// described uses DescribeKey to explain, to check the kind of key at first
// contact, and to settle an ambiguous refusal; it never opens anything.
func (m machine) described(o observation, now instant) (machine, action) {
	v := verdict{state: o.desc.State, reason: o.desc.Reason, detail: o.desc.Problem, requestID: o.desc.RequestID}
	if o.err != nil {
		v = judgement(o.err)
		if v.state == Deleted {
			v = m.notFound(v)
		}
	}
	if m.doubt == ambiguous {
		if o.started < m.doubtSince {
			return m, actDescribe // asked before the doubt arose: ask again
		}
		return m.settle(v, o, now)
	}
	switch m.gate {
	case Starting, Thawing:
		if v.state == Misconfigured && !m.opened {
			m.verdict = v
			m.gate = Starting
			return m, actRefuse
		}
		if v.state != Unreachable {
			m.contacted = true
		}
		if m.streak > 0 && m.gate == Starting && m.contacted {
			return m.mayThaw(verdict{state: Enabled, requestID: o.desc.RequestID}, now)
		}
	case Open, Degraded:
		return m, 0
	}
	return m.refine(v, o, now), 0
}

// settle ends the doubt of an ambiguous refusal.
func (m machine) settle(v verdict, o observation, now instant) (machine, action) {
	if o.err == nil && v.state == Enabled {
		// The key is fine and the call failed all the same: with a custom key
		// store that is a general failure. An outage, then.
		m.doubt = noDoubt
		w := m.doubted
		w.state = Unreachable
		m.gate = Degraded
		m.verdict = w
		return m, 0
	}
	w := m.doubted
	m.explained, m.explainedAs, m.explainedAt = verdict{}, w.reason, now
	if v.state.refuses() && o.err == nil {
		m.explained = v
		w.state, w.reason = v.state, v.reason
		m.deletion = o.desc.DeletionDate
	}
	m, act := m.freeze(w, now)
	return m, act &^ actDescribe
}

// refine replaces a refusal by DescribeKey's more precise word.
func (m machine) refine(v verdict, o observation, now instant) machine {
	if o.err != nil && v.state != Deleted || m.streak > 0 || !m.state.refuses() && m.state != Unknown {
		return m
	}
	m.explained, m.explainedAt = v, now
	if m.requestID == "" { // heard of before any probe was refused
		m.requestID = v.requestID
	}
	switch {
	case m.state == AccessDenied && v.state != Deleted:
		// KMS checks permission first, so both may be true; the missing
		// permission is what must be mended to get any further.
		also := "; the key is also " + v.state.String()
		if v.state.refuses() && !strings.Contains(m.detail, also) {
			m.detail += also
		}
		return m
	case v.state == Enabled && m.reason == ReasonInvalidState:
		m.reason = ReasonKeyStoreDown // Unavailable although enabled
		m.explained.state, m.explained.reason = m.state, m.reason
	case v.state.refuses():
		m.state, m.reason = v.state, v.reason
	}
	m.deletion = o.desc.DeletionDate
	return m
}
