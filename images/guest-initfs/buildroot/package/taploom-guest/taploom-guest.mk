################################################################################
#
# taploom-guest
#
################################################################################

TAPLOOM_GUEST_SITE = $(TAPLOOM_CHECKOUT)
TAPLOOM_GUEST_SITE_METHOD = local
TAPLOOM_GUEST_OVERRIDE_SRCDIR_RSYNC_EXCLUSIONS = --exclude build --exclude .venv --exclude node_modules
TAPLOOM_GUEST_DEPENDENCIES = python3 python-betterproto2 python-trio python-h2 python-dnspython taploom-init

define TAPLOOM_GUEST_INSTALL_TARGET_CMDS
	mkdir -p $(TARGET_DIR)/usr/lib/taploom
	cp -r $(@D)/agent_guest $(@D)/taploom $(TARGET_DIR)/usr/lib/taploom/
	cp -r $(@D)/images/guest-initfs/files/. $(TARGET_DIR)/
	cp $(@D)/images/common/start.py $(TARGET_DIR)/usr/lib/taploom/
	$(SED) 's,/usr/bin/python3.13,/usr/bin/python3,' $(TARGET_DIR)/etc/taploom/init.conf
endef

$(eval $(generic-package))
