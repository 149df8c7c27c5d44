# The checkout that this tree is part of, and the wheels that `images/guest-initfs/build --builder buildroot` put there.
TAPLOOM_CHECKOUT = $(BR2_EXTERNAL_TAPLOOM_PATH)/../../..
TAPLOOM_WHEELS ?= $(TAPLOOM_CHECKOUT)/build/images/guest-initfs/wheels

include $(sort $(wildcard $(BR2_EXTERNAL_TAPLOOM_PATH)/package/*/*.mk))
