package objstore

import "testing"

// TestKeysThatMislead: what a store that takes keys for paths would find under byokd's
// own prefix, or outside the bucket, is known as such.
func TestKeysThatMislead(t *testing.T) {
	for key, want := range map[string]struct{ hidden, climbs bool }{
		".byokd/keyring":                {hidden: true},
		"./.byokd/keyring":              {hidden: true},
		"/.byokd/keyring":               {hidden: true},
		"//.byokd//keyring":             {hidden: true},
		"a/../.byokd/keyring":           {hidden: true},
		"a/b/../../.byokd/x/../keyring": {hidden: true},
		"../documents/.byokd/keyring":   {climbs: true},
		"..":                            {climbs: true},
		"../other/x":                    {climbs: true},
		"a/../../other/x":               {climbs: true},
		"./../x":                        {climbs: true},
		".":                             {climbs: true},
		"a/../":                         {climbs: true},
		"/":                             {},
		"a/.byokd/keyring":              {},
		".byokd":                        {},
		".byokdx/keyring":               {},
		"x.byokd/keyring":               {},
		"a/../b":                        {},
		"..a/b..":                       {},
		"":                              {},
		"a//b/./c/":                     {},
	} {
		if hidden(key) != want.hidden || climbs(key) != want.climbs {
			t.Errorf("%q: hidden %v, climbs %v", key, hidden(key), climbs(key))
		}
	}
}
