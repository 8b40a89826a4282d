.PHONY: run test lint bench package

run:
	./scripts/run
test:
	./scripts/test
lint:
	./scripts/lint
bench:
	./scripts/bench
package:
	./scripts/package
